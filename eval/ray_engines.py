"""Offline engines on a Ray cluster: Ray Data hands blocks of requests to actors, each of which holds one engine.

An actor is a process on some machine of the cluster, with an engine (serve/offline.py) of its own, so base, store and
this project must be at the same place on each. An actor that dies is started again by Ray, and gets the blocks again
that it had; an engine that ends is started again by its actor, up to RESTARTS times. Answers come in the order in which
their blocks are done. Ray keeps no record of them: the caller writes them down, and asks only for what is missing.

RAY_ADDRESS names the cluster (`10.0.0.4:6379`, `ray://10.0.0.4:10001`); without it, Ray is started on this machine for
as long as the answers take.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from counsel.errors import UserError
from serve.config import ServeConfig
from serve.offline import OfflineAnswer, OfflineEngine

RESTARTS = 3
NO_ENGINE = 0
# How many blocks an actor works on at a time: while the last requests of one are answered, others fill the engine.
BLOCKS_AT_ONCE = 8
Columns = dict[str, Any]
T = TypeVar("T")


class RayRequest(NamedTuple):
    """One request: its name, and the path and body as a server gets them."""

    custom_id: str
    path: str
    body: dict[str, Any]


class EngineActor:
    """One engine. Ray calls it with a block of requests, several blocks at a time in threads of their own."""

    def __init__(self, settings: dict[str, Any], engine: type[OfflineEngine] = OfflineEngine) -> None:
        self._settings, self._kind = ServeConfig(**settings), engine
        self._restarts, self._starting = 0, asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._refusal = ""
        try:
            self._engine = self._run(self._start())
        except UserError as error:
            # Raised here, it would count as a death, and Ray would try the same start for ever.
            self._refusal = str(error)

    def __call__(self, block: Columns) -> Columns:
        """Columns `custom_id`, `path`, `body` (JSON) in; `custom_id`, `status`, `body` (JSON) out.

        Status NO_ENGINE and the reason where there is no engine: as an exception it would arrive among Ray's own words.
        """
        try:
            if self._refusal:
                raise UserError(self._refusal)
            answers = self._run(self._answer_all(block))
        except UserError as error:
            answers = [OfflineAnswer(NO_ENGINE, {"reason": str(error)})] * len(block["path"])
        return {
            "custom_id": block["custom_id"],
            "status": np.array([answer.status for answer in answers]),
            "body": np.array([json.dumps(answer.body) for answer in answers], dtype=object),
        }

    async def _answer_all(self, block: Columns) -> list[OfflineAnswer]:
        asked = [(str(path), json.loads(body)) for path, body in zip(block["path"], block["body"], strict=True)]
        while True:
            engine = self._engine
            try:
                return await asyncio.gather(*(engine.ask(path, body) for path, body in asked))
            except UserError as error:
                await self._replace(engine, error)

    async def _replace(self, ended: OfflineEngine, error: UserError) -> None:
        """Start another engine, unless another block has done so. Raises UserError after RESTARTS of them."""
        async with self._starting:
            if self._engine is not ended:
                return
            if self._restarts == RESTARTS:
                raise UserError(f"{error}, for the {RESTARTS + 1}th time on {os.uname().nodename}")
            self._restarts += 1
            await ended.__aexit__(None, None, None)
            self._engine = await self._start()

    async def _start(self) -> OfflineEngine:
        log = Path(tempfile.mkdtemp(prefix="counsel-batch-")) / "engine.log"
        try:
            return await self._kind(self._settings, log).__aenter__()
        except UserError as error:
            raise UserError(f"{error} on {os.uname().nodename}") from error

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def answers_on_ray(
    settings: ServeConfig, requests: Sequence[RayRequest], actors: int, in_flight: int,
    engine: type[OfflineEngine] = OfflineEngine,
) -> Iterator[tuple[str, OfflineAnswer]]:  # fmt: skip
    """Each request's `custom_id` and answer. in_flight: per actor. Raises UserError if an engine does not start."""
    require_ray()
    import ray.data
    import ray.exceptions

    size = max(1, min(in_flight // BLOCKS_AT_ONCE, -(-len(requests) // (actors * BLOCKS_AT_ONCE))))
    # Bodies as text: Ray would give all of them the fields of all.
    rows = [{"custom_id": r.custom_id, "path": r.path, "body": json.dumps(r.body)} for r in requests]
    with _connected(actors):
        blocks = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size))
        answered = blocks.map_batches(
            EngineActor,
            fn_constructor_args=(asdict(settings), engine),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(
                size=actors,
                max_tasks_in_flight_per_actor=BLOCKS_AT_ONCE,
                max_concurrent_calls_per_actor=BLOCKS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=1,
            num_gpus=_gpus_per_engine(settings),
        )
        try:
            # Nothing is fetched ahead: what is fetched is written down.
            for batch in answered.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
                for name, status, body in zip(batch["custom_id"], batch["status"], batch["body"], strict=True):
                    answer = OfflineAnswer(int(status), json.loads(body))
                    if answer.status == NO_ENGINE:
                        raise UserError(answer.body["reason"])
                    yield str(name), answer
        except ray.exceptions.RayError as error:
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(f"Ray gave up: {type(error).__name__}: {reason}; finished rows are kept") from error


def require_ray() -> None:
    """Raise UserError where Ray is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"engine is 'ray', but Ray is not here ({error}); pip install 'counsel-stack[ray]', or leave --engine out"
        ) from error


@contextlib.contextmanager
def _connected(actors: int) -> Iterator[None]:
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="warning")
        if (cpus := ray.cluster_resources().get("CPU", 0)) < actors:
            print(f"the Ray cluster has {cpus:.0f} CPUs for {actors} actors; the others wait", file=sys.stderr)
    else:
        # One more than the actors take, so that Ray's own tasks never wait for them.
        ray.init(
            address="local",
            num_cpus=max(actors + 1, os.cpu_count() or 1),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            logging_level="warning",
        )
    try:
        yield
    finally:
        ray.shutdown()


def _gpus_per_engine(settings: ServeConfig) -> int:
    import ray

    if not ray.cluster_resources().get("GPU"):
        return 0
    return (settings.tensor_parallel_size or 1) * (settings.data_parallel_size or 1)
