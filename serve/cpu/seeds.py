"""Keep a seeded request from ending the engine on a CPU.

When a prompt is read in several steps, vLLM samples after each and takes the early samples back. For a request with a
`seed` it does so by rewinding the generator's offset, which CPU generators do not have: "CPU Generator does not use
offset" ends the engine (vLLM 0.32, GPUModelRunner._bookkeeping_sync). Here the generator's state is put back
instead, so that a seed means the same however its prompt was cut. vLLM has no hook for this; a `vllm.general_plugins`
entry point wraps the two methods.
"""

from typing import Any


def register() -> None:
    """Wrap vLLM's CPU runner; on anything but this project's CPU platform, do nothing."""
    from vllm.platforms import current_platform

    if type(current_platform).__module__ != "serve.cpu.platform":
        return

    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if getattr(CPUModelRunner._sample, "__module__", "") == __name__:
        return  # vLLM may load a plugin twice in one process

    sample, bookkeep = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def _sample(runner: Any, *args: Any, **kwargs: Any) -> Any:
        states = {generator: generator.get_state() for generator in _taken_back(runner).values()}
        output = sample(runner, *args, **kwargs)
        for generator, state in states.items():
            generator.set_state(state)
        return output

    def _bookkeeping_sync(runner: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = _taken_back(runner)
        for index in hidden:
            del runner.input_batch.generators[index]
        try:
            return bookkeep(runner, *args, **kwargs)
        finally:
            runner.input_batch.generators.update(hidden)

    CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync = _sample, _bookkeeping_sync


def _taken_back(runner: Any) -> dict[int, Any]:
    """The generators, by row, of requests whose sample of this step does not count."""
    discarded = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    return {index: generator for index, generator in runner.input_batch.generators.items() if discarded[index]}
