"""Tells an address of the operator's that a risk was found. Off by default; never delays or changes a reply.

The payload is the label, a salted name of the conversation that only this process knows, and the time.
"""

import asyncio
import datetime
import logging
from collections.abc import Callable

from counsel.safety.policy import Policy

log = logging.getLogger("vllm.counsel")

_MAX_OPEN = 16


class Webhook:
    """Posts to `webhook_url`. At most 16 calls run at a time; further ones are counted as failed."""

    def __init__(self, policy: Policy, on_fault: Callable[[str], None]) -> None:
        self._url, self._labels, self._seconds = policy.webhook_url, policy.webhook_labels, policy.webhook_s
        self._on_fault = on_fault
        # The event loop itself holds tasks only weakly.
        self._open: set[asyncio.Task[None]] = set()

    def notify(self, label: str, conversation: str) -> None:
        """Start a call if the policy wants to be told of this risk."""
        if not self._url or label not in self._labels:
            return
        if len(self._open) >= _MAX_OPEN:
            self._on_fault("full")
            return
        task = asyncio.create_task(self._post(label, conversation))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _post(self, label: str, conversation: str) -> None:
        import httpx2

        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        payload = {"label": label, "conversation": conversation, "time_utc": now}
        try:
            async with asyncio.timeout(self._seconds), httpx2.AsyncClient() as client:
                (await client.post(self._url, json=payload)).raise_for_status()
        except Exception as error:  # a receiver's fault must not become the person's
            log.error("the webhook failed: %s", type(error).__name__)
            self._on_fault("timeout" if isinstance(error, TimeoutError) else "error")
