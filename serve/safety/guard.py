"""A guard model behind an OpenAI-compatible endpoint, asked beside the detector."""

import os
import re
from collections.abc import Sequence
from typing import Any

from counsel.client import make_async_client
from counsel.errors import UserError
from counsel.safety.policy import Policy

# Guards that reason first need room for it.
_MAX_TOKENS = 512


class Guard:
    """Asks whether the user's turns show a risk. Its answer is read with the policy's two patterns."""

    def __init__(self, policy: Policy) -> None:
        """Raises UserError if the policy names a variable for its key that is not set."""
        key = os.environ.get(policy.guard_key_env, "") if policy.guard_key_env else "none"
        if not key:
            raise UserError(f"guard_key_env is {policy.guard_key_env!r}, but that variable is not set; set it")
        self._client = make_async_client(policy.guard_url, key, policy.guard_s)
        self._model, self._system = policy.guard_model, policy.guard_system
        self._unsafe = re.compile(policy.guard_unsafe, re.IGNORECASE)
        self._safe = re.compile(policy.guard_safe, re.IGNORECASE)

    async def finds_risk(self, user_turns: Sequence[str]) -> bool:
        """Whether the guard calls the conversation unsafe.

        Raises openai's errors, and ValueError for an answer that is neither safe nor unsafe.
        """
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages: Any = [*system, {"role": "user", "content": "\n\n".join(user_turns)}]
        reply = await self._client.chat.completions.create(
            model=self._model,
            messages=messages,
            max_tokens=_MAX_TOKENS,
            temperature=0,
        )
        answer = reply.choices[0].message.content or ""
        if self._unsafe.search(answer):
            return True
        if self._safe.search(answer):
            return False
        raise ValueError("the guard's answer is neither safe nor unsafe")
