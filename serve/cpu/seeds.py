"""Keeps a request with a seed from crashing the engine on a CPU.

When vLLM reads a prompt in several steps, it samples after each step and discards the early samples. For a request with
a `seed` it then rewinds the generator's offset, which CPU generators lack: "CPU Generator does not use offset" ends the
engine (vLLM 0.32, GPUModelRunner._bookkeeping_sync). Here the generator's state is restored instead, so that a seed
gives the same answer however the prompt was split. vLLM has no hook for this, so a `vllm.general_plugins` entry point
wraps the two methods.
"""

from typing import Any


def register() -> None:
    """Wrap two methods of vLLM's CPU runner, on this project's CPU platform only."""
    from vllm.platforms import current_platform

    if type(current_platform).__module__ != "serve.cpu.platform":
        return

    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if getattr(CPUModelRunner._sample, "__module__", "") == __name__:
        return  # vLLM may load a plugin twice per process

    sample, bookkeep = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def _sample(runner: Any, *args: Any, **kwargs: Any) -> Any:
        states = {generator: generator.get_state() for generator in _discarded(runner).values()}
        output = sample(runner, *args, **kwargs)
        for generator, state in states.items():
            generator.set_state(state)
        return output

    def _bookkeeping_sync(runner: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = _discarded(runner)
        for index in hidden:
            del runner.input_batch.generators[index]
        try:
            return bookkeep(runner, *args, **kwargs)
        finally:
            runner.input_batch.generators.update(hidden)

    CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync = _sample, _bookkeeping_sync


def _discarded(runner: Any) -> dict[int, Any]:
    """The generators, by row, of requests whose sample in this step is discarded."""
    discarded = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    return {index: generator for index, generator in runner.input_batch.generators.items() if discarded[index]}
