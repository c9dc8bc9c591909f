"""The worker class that serve/cpu/platform.py names. It decides when an adapter is loaded and when it takes a slot.

vLLM gives each adapter a slot as soon as it is loaded, and takes slots in the order in which a step names its adapters.
While answers use every slot, this evicts adapters in use, and the next step writes them again, one after the other.
Here a loaded adapter waits in host memory until a step needs it, and the adapters of that step keep their slots.
"""

from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from serve.cpu.runner import CounselCpuModelRunner


class HostFirstLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's adapter manager, but loading goes to host memory only."""

    def load_to_host(self, lora_request: LoRARequest) -> bool:
        """Load an adapter into host memory; False if it was there. Raises what vLLM raises for its files."""
        if lora_request.lora_int_id in self.list_adapters():
            return False
        adapter = self._load_adapter(lora_request)
        if len(self._adapter_manager) >= self._adapter_manager.capacity:
            self._adapter_manager.remove_oldest_adapter()
        return self._adapter_manager.add_adapter(adapter)

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        # vLLM gives out slots in this order and evicts the least recently used, so adapters in a slot go first.
        in_slots = self._adapter_manager.lora_index_to_id
        super()._apply_adapters(sorted(lora_requests, key=lambda request: request.lora_int_id not in in_slots))


class CounselCpuWorker(CPUWorker):
    """vLLM's CPU worker with that manager, and with the runner from serve/cpu/runner.py."""

    def init_device(self) -> None:
        super().init_device()
        # vLLM's worker hard-codes its runner's class. Ours needs no state from a constructor.
        if type(self.model_runner) is CPUModelRunner:
            self.model_runner.__class__ = CounselCpuModelRunner

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        if self.vllm_config.lora_config is None:
            return
        runner = self.model_runner
        manager = HostFirstLoRAManager(self.vllm_config, self.device, runner.model.embedding_modules)
        manager._adapter_manager = adapters = runner.lora_manager._adapter_manager
        runner.lora_manager = manager
        for wrapper in adapters.punica_wrapper_mapping.values():
            wrapper.adapter_of = adapters.get_adapter
        for layer in adapters.modules.values():
            if isinstance(layer, BaseLinearLayerWithLoRA):
                layer.punica_wrapper.register_layer(layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        # vLLM compiles small functions, such as the one behind `logprobs`, when a request first needs them. That stops
        # all answers for seconds, and ends the engine if there is no compiler. From here on, compiled functions are
        # used, and others run uncompiled.
        torch.compiler.set_stance("eager_on_recompile")
        return times

    def add_lora(self, lora_request: LoRARequest) -> bool:
        if self.vllm_config.lora_config is None or lora_request.load_inplace:
            return super().add_lora(lora_request)
        return self.model_runner.lora_manager.load_to_host(lora_request)
