"""The model runner that serve/cpu/worker.py puts in: what overflows in one request stays in that request.

Attention reads key-value blocks whole and weighs what is not a request's own with 0, and 0 times NaN is NaN: an adapter
whose numbers overflow would spoil the answers of whoever is given its blocks next (vLLM 0.32). So each block is cleared
when a request is given it. The rows of a request whose scores are not finite are reported in the field that vLLM has
for that, and serve/scheduler.py ends the request.
"""

from typing import Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class CounselCpuModelRunner(CPUModelRunner):
    """vLLM's CPU runner with clean blocks and a look at each step's scores."""

    def _zero_block_ids(self, block_ids: list[int]) -> None:
        # vLLM's own clears the layers of full attention only.
        caches = {cache.data_ptr(): cache for cache in self.kv_caches if isinstance(cache, torch.Tensor)}
        for cache in caches.values():
            for block in block_ids:
                cache[block].zero_()

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: Any) -> Any:
        # Before the sampler, which writes into the scores. Guessed tokens have rows of their own: no request's.
        self.not_finite = rows_not_finite(logits) if logits is not None and spec_decode_metadata is None else []
        return super()._sample(logits, spec_decode_metadata)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        _, *rest = super()._bookkeeping_sync(*args, **kwargs)
        return {self.input_batch.req_ids[row]: 1 for row in self.not_finite}, *rest


def rows_not_finite(logits: torch.Tensor) -> list[int]:
    """The rows that no token can be chosen from: they hold a NaN, an infinity, or nothing above minus infinity."""
    # One pass without a copy; vLLM's count of NaNs takes ten times as long. The largest of a row with a NaN is NaN.
    return torch.nonzero(~logits.amax(dim=-1).isfinite()).flatten().tolist()
