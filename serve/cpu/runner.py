"""The model runner of serve/cpu/worker.py: an overflow in one request does not reach another.

Attention reads whole key-value blocks and multiplies what belongs to other requests by 0, and 0 times NaN is NaN. So
after an adapter overflows, the next requests to get its blocks would get wrong answers (vLLM 0.32). Therefore each
block is cleared before a request gets it. Requests whose scores are not finite are reported in vLLM's field for that,
and serve/scheduler.py ends them.
"""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class CounselCpuModelRunner(CPUModelRunner):
    """vLLM's CPU runner that clears blocks, checks each step's scores, and puts LoRA on quantized layers."""

    def load_lora_model(self, model: torch.nn.Module, *args: Any) -> torch.nn.Module:
        # oneDNN keeps a quantized layer's weight and leaves None, of which vLLM's LoRA asks the device (vLLM 0.32).
        for module in model.modules():
            if isinstance(module, LinearBase) and getattr(module, "weight", 0) is None:
                module.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        return super().load_lora_model(model, *args)

    def _zero_block_ids(self, block_ids: list[int]) -> None:
        # vLLM's own method clears only the layers with full attention.
        caches = {cache.data_ptr(): cache for cache in self.kv_caches if isinstance(cache, torch.Tensor)}
        for cache in caches.values():
            for block in block_ids:
                cache[block].zero_()

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: Any) -> Any:
        # Before the sampler, which overwrites the scores. With speculative tokens, rows do not map to requests.
        self.not_finite = rows_not_finite(logits) if logits is not None and spec_decode_metadata is None else []
        return super()._sample(logits, spec_decode_metadata)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        _, *rest = super()._bookkeeping_sync(*args, **kwargs)
        return {self.input_batch.req_ids[row]: 1 for row in self.not_finite}, *rest


def rows_not_finite(logits: torch.Tensor) -> list[int]:
    """The rows from which no token can be chosen: with a NaN, an infinity, or only minus infinity."""
    # One pass without a copy; vLLM's count of NaNs takes ten times as long. The maximum of a row with a NaN is NaN.
    return torch.nonzero(~logits.amax(dim=-1).isfinite()).flatten().tolist()
