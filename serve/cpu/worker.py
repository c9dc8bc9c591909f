"""The worker class that serve/cpu/platform.py names: when an adapter is read, and when it takes a slot.

vLLM gives each adapter a slot the moment it is read, and takes slots in whatever order a step names its adapters. While
answers run on every slot, that turns out adapters in use, which the next step writes again, one after the other. Here
an adapter that was read waits in host memory until a step needs it, and what the step already has keeps its slot.
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
    """vLLM's manager of adapters, in host memory first."""

    def read(self, lora_request: LoRARequest) -> bool:
        """Read an adapter into host memory; False where it was there. Raises what vLLM raises for its files."""
        if lora_request.lora_int_id in self.list_adapters():
            return False
        adapter = self._load_adapter(lora_request)
        if len(self._adapter_manager) >= self._adapter_manager.capacity:
            self._adapter_manager.remove_oldest_adapter()
        return self._adapter_manager.add_adapter(adapter)

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        # vLLM takes them in this order, and the slot of the one that was longest not taken.
        standing = self._adapter_manager.lora_index_to_id
        super()._apply_adapters(sorted(lora_requests, key=lambda request: request.lora_int_id not in standing))


class CounselCpuWorker(CPUWorker):
    """vLLM's CPU worker with that manager, and with serve/cpu/runner.py's runner."""

    def init_device(self) -> None:
        super().init_device()
        # vLLM's worker names its runner's class and asks nobody. Ours adds no state that its making would set.
        if type(self.model_runner) is CPUModelRunner:
            self.model_runner.__class__ = CounselCpuModelRunner

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        if self.vllm_config.lora_config is None:
            return
        runner = self.model_runner
        manager = HostFirstLoRAManager(self.vllm_config, self.device, runner.model.embedding_modules)
        manager._adapter_manager = slots = runner.lora_manager._adapter_manager
        runner.lora_manager = manager
        for wrapper in slots.punica_wrapper_mapping.values():
            wrapper.adapter_of = slots.get_adapter
        for layer in slots.modules.values():
            if isinstance(layer, BaseLinearLayerWithLoRA):
                layer.punica_wrapper.know(layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        # vLLM marks small functions, such as the count behind `logprobs`, to be compiled when a request first needs
        # them: seconds in which every answer stands still, and the engine's end where there is no compiler. From here
        # on what is compiled is used, and what is not runs as it is written.
        torch.compiler.set_stance("eager_on_recompile")
        return times

    def add_lora(self, lora_request: LoRARequest) -> bool:
        if self.vllm_config.lora_config is None or lora_request.load_inplace:
            return super().add_lora(lora_request)
        return self.model_runner.lora_manager.read(lora_request)
