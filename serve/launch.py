"""From a config, a base and a machine to the command line and environment of the server, with a reason for each choice.

Pure: it starts nothing and reads only the base's config.json. A choice can be overridden three ways: by the fields of
`ServeConfig`, by any vLLM flag in its `vllm_args` (they come last and win), and, for environment variables, by setting
the variable before the start.
"""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from counsel.catalog import Base, weight_files
from counsel.files import read_json
from serve.config import ServeConfig
from serve.hardware import Hardware

PLUGINS = ("counsel_platform", "counsel_cpu_ops", "counsel_cpu_seeds", "counsel_adapters", "counsel_log_privacy")
THREADS_BIND, START_METHOD = "VLLM_CPU_OMP_THREADS_BIND", "VLLM_WORKER_MULTIPROC_METHOD"
EXECUTOR = "COUNSEL_CPU_EXECUTOR"
# The key in vLLM's --additional-config under which serve/scheduler.py finds it.
WAIT = "adapter_wait_s"
SCHEDULER = "serve.scheduler.make_scheduler"
CONTEXT_CAP_TOKENS = 4096
# Largest head of an HTTP request.
HEAD_BYTES = 64 << 10
REQUEST_TOKENS = 1024
BLOCK_TOKENS = 32
FEW_CORES = 4
WEIGHTS_SHARE = 0.6
GIB = 1 << 30


class Reason(NamedTuple):
    """One choice as a user reads it, and why it was made."""

    choice: str
    why: str


class Plan(NamedTuple):
    """What to start: the whole argv, the variables to add to the environment, and a reason for each choice."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    reasons: tuple[Reason, ...]

    def explain(self) -> str:
        """One line for each reason."""
        return "\n".join(f"  {reason.choice}: {reason.why}" for reason in self.reasons)


def plan(
    config: ServeConfig,
    base: Base,
    machine: Hardware,
    ranks: Sequence[int] = (),
    targets: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Plan:
    """How to serve `base` on `machine`.

    ranks: those of the adapters in the store. targets: the layers of this base that an adapter may change, as vLLM
    names them (counsel.lora_layers); with none, all that vLLM can change.
    """
    chosen = _Choices(environ)
    chosen.flag("--model", str(base.path))
    chosen.flag("--served-model-name", base.name)
    chosen.flag("--host", config.host)
    chosen.flag("--port", str(config.port))
    # More than one API process would each keep their own list of adapters.
    chosen.flag("--api-server-count", "1")
    _lora(chosen, config, ranks, targets)
    described = read_json(Path(base.path) / "config.json")
    shape = described.get("text_config", described)
    running = config.max_num_seqs or min(256, 32 * len(machine.cpus))
    dtype = _dtype(chosen, config, base, described, machine)
    _shape(chosen, config, shape, running, machine, itemsize=4 if dtype == "float32" else 2)
    _compile(chosen, config, machine)
    if machine.device == "cuda":
        # On a CPU the platform names it, which also stands for vLLM's own in whatever else starts an engine.
        chosen.flag("--scheduler-cls", SCHEDULER, why="adapters take turns in the slots")
        chosen.variable("VLLM_COMPUTE_NANS_IN_LOGITS", "1", "a request whose scores overflow ends with an error")
    chosen.variable("VLLM_PLUGINS", ",".join(PLUGINS), "ours only; a plugin vLLM is not told of does not load")
    chosen.variable("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "120", "idle connections outlive those in clients' pools")
    # Its tool-call grammars are for another backend than the one below.
    chosen.variable("VLLM_ENFORCE_STRICT_TOOL_CALLING", "0", "a forced tool call is held to its JSON schema")
    for name, value in (("VLLM_HOST_IP", "127.0.0.1"), ("GLOO_SOCKET_IFNAME", "lo")):
        chosen.variable(name, value, "the engine's processes talk to each other inside this machine only")
    chosen.variable(
        "LLGUIDANCE_LOG_LEVEL", "0", "a grammar's errors quote what a caller wrote: they stay out of the log"
    )
    chosen.variable("VLLM_NO_USAGE_STATS", "1", "nothing is reported to anyone")
    if machine.device == "cpu":
        _threads(chosen, machine)
        # Sampling sorts each running request's scores of the whole vocabulary; their order takes eight bytes each.
        _preload(chosen, machine, scratch_bytes=running * shape["vocab_size"] * 8)
    if config.vllm_args:
        chosen.argv += shlex.split(config.vllm_args)
        chosen.reasons.append(Reason(config.vllm_args, "asked for with vllm_args"))
    return Plan((sys.executable, "-m", "serve.api_process", *chosen.argv), chosen.env, tuple(chosen.reasons))


def gateway_flags(config: ServeConfig) -> tuple[str, ...]:
    """vLLM's flags that put our gate in front of it and close what it would leave open."""
    return (
        *("--middleware", "serve.gateway.Gateway"),
        *("--allowed-origins", json.dumps(config.allowed_origins)),
        *("--override-generation-config", json.dumps({"max_new_tokens": config.max_completion_tokens})),
        # A small model asked for JSON may write blanks for ever where the grammar lets it.
        *("--structured-outputs-config", json.dumps({"backend": "guidance", "disable_any_whitespace": True})),
        # Nothing is fetched for a caller, should a request to do so ever come through the gate.
        *("--allowed-media-domains", "nothing.invalid"),
        *("--h11-max-incomplete-event-size", str(HEAD_BYTES)),
        "--disable-fastapi-docs",
        "--disable-uvicorn-access-log",
    )


class _Choices:
    """Collects flags, variables and reasons in the order they are made."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.argv: list[str] = []
        self.env: dict[str, str] = {}
        self.reasons: list[Reason] = []

    def flag(self, name: str, *values: str, why: str = "") -> None:
        self.argv += [name, *values]
        if why:
            self.reasons.append(Reason(" ".join((name, *values)), why))

    def variable(self, name: str, value: str, why: str) -> None:
        """Set `name`, unless the user did: then theirs stays."""
        if name in self.environ:
            self.reasons.append(Reason(f"{name}={self.environ[name]}", "set in your environment"))
        else:
            self.env[name] = value
            self.reasons.append(Reason(f"{name}={value}", why))


def _lora(chosen: _Choices, config: ServeConfig, ranks: Sequence[int], targets: Sequence[str]) -> None:
    chosen.flag("--enable-lora")
    chosen.flag("--max-loras", str(config.max_loras), why="adapters that one batch may mix (max_loras)")
    chosen.flag("--max-cpu-loras", str(config.max_cpu_loras), why="adapters in host memory (max_cpu_loras)")
    largest = max(ranks, default=0)
    if largest > config.max_lora_rank:
        why = f"max_lora_rank; the store holds rank {largest}, which is refused: start with --max-lora-rank {largest}"
    else:
        why = "max_lora_rank; it costs memory, not time: the arithmetic is done at each adapter's own rank"
    chosen.flag("--max-lora-rank", str(config.max_lora_rank), why=why)
    wait = json.dumps({WAIT: config.adapter_wait_s})
    chosen.flag("--additional-config", wait, why="how long an adapter may wait for a slot before others give way")
    if targets:
        why = "all linear layers of this base; leaving the vocabulary out saves a pass over it for every token"
        chosen.flag("--lora-target-modules", *targets, why=why)


def _dtype(chosen: _Choices, config: ServeConfig, base: Base, described: Mapping[str, Any], machine: Hardware) -> str:
    dtype, why = config.dtype, "dtype" if config.dtype != "auto" else "the model's"
    # A quantized base's own kernels decide what they take.
    if dtype == "auto" and machine.device == "cpu" and "quantization_config" not in described:
        dtype, why = machine.processor.dtype, machine.processor.why
        # Published weights hold 2 bytes a number, but for the few that say otherwise.
        stored = described.get("dtype", described.get("torch_dtype"))
        weights = sum(file.stat().st_size for file in weight_files(base.path)) * (1 if stored == "float32" else 2)
        if dtype == "float32" and weights > machine.memory_bytes * WEIGHTS_SHARE:
            dtype = "bfloat16"
            why = f"slow here, but float32 would fill {weights / GIB:.0f} of {machine.memory_bytes / GIB:.0f} GiB"
    chosen.flag("--dtype", dtype, why=why)
    return dtype


def _shape(
    chosen: _Choices, config: ServeConfig, shape: Mapping[str, int], running: int, machine: Hardware, itemsize: int
) -> None:
    """Context, running requests, batched tokens, key-value memory."""
    context = config.max_model_len or min(CONTEXT_CAP_TOKENS, shape.get("max_position_embeddings", CONTEXT_CAP_TOKENS))
    why = "max_model_len" if config.max_model_len else f"the model's, at most {CONTEXT_CAP_TOKENS}"
    chosen.flag("--max-model-len", str(context), why=why)
    if machine.device != "cpu":
        if config.max_num_seqs:
            chosen.flag("--max-num-seqs", str(config.max_num_seqs), why="max_num_seqs")
        if config.kv_cache_memory_gb:
            chosen.flag("--kv-cache-memory-bytes", str(int(config.kv_cache_memory_gb * 1e9)), why="kv_cache_memory_gb")
        return

    cores = len(machine.cpus)
    why = (
        "max_num_seqs"
        if config.max_num_seqs
        else f"32 for each of {cores} cores: with more, each waits longer for no more in all"
    )
    chosen.flag("--max-num-seqs", str(running), why=why)
    why = "a step of prompt tokens holds up every running answer; this many take about half a second"
    chosen.flag("--max-num-batched-tokens", str(max(running, min(2048, 256 * cores))), why=why)
    why = "prefixes are shared in whole blocks; vLLM's 128 would miss most system prompts"
    chosen.flag("--block-size", str(BLOCK_TOKENS), why=why)
    kv_bytes = (
        int(config.kv_cache_memory_gb * 1e9)
        if config.kv_cache_memory_gb
        else _kv_bytes(shape, context, running, machine, itemsize)
    )
    why = f"{kv_bytes / GIB:.1f} GiB: {running} requests of {REQUEST_TOKENS} tokens, at most a quarter of the memory"
    chosen.flag(
        "--kv-cache-memory-bytes", str(kv_bytes), why="kv_cache_memory_gb" if config.kv_cache_memory_gb else why
    )


def _kv_bytes(shape: Mapping[str, int], max_model_len: int, running: int, machine: Hardware, itemsize: int) -> int:
    heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
    head_size = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    token_bytes = 2 * itemsize * shape["num_hidden_layers"] * heads * head_size
    # One request of full length must fit, whatever else. More costs time too: a server touches all of it to start.
    wanted = token_bytes * max(max_model_len, running * REQUEST_TOKENS)
    return min(max(wanted, GIB // 4), machine.memory_bytes // 4)


def _compile(chosen: _Choices, config: ServeConfig, machine: Hardware) -> None:
    if not config.compile:
        chosen.flag("--enforce-eager", why="no-compile: ready sooner, slower answers")
    elif machine.device == "cpu" and machine.compiler is None:
        chosen.flag("--enforce-eager", why="compiling needs g++, which is not here (Debian: apt install g++)")


def _threads(chosen: _Choices, machine: Hardware) -> None:
    if len(machine.cpus) > FEW_CORES:
        chosen.variable(THREADS_BIND, "auto", "vLLM binds one thread a core and keeps one core back")
        return
    why = f"all {len(machine.cpus)} cores compute; vLLM would keep one back, which is too dear on so few"
    chosen.variable(THREADS_BIND, ",".join(map(str, machine.cpus)), why)
    # GCC's OpenMP hangs in a forked process, and Intel's binds it to all cores in their order, whatever was asked for.
    if _intel_openmp(chosen, machine) and THREADS_BIND in chosen.env:
        why = "the engine's processes inherit what the first one imported: ready in half the time"
        chosen.variable(START_METHOD, "fork", why)
        why = "the model runs in the scheduler's process: between two, each step is handed over by spinning on a core"
        chosen.variable(EXECUTOR, "uni", why)


def _intel_openmp(chosen: _Choices, machine: Hardware) -> bool:
    # vLLM refuses to start with two OpenMPs.
    return machine.openmp is not None and "libgomp" not in chosen.environ.get("LD_PRELOAD", "")


def _preload(chosen: _Choices, machine: Hardware, scratch_bytes: int) -> None:
    libraries, whys = [], []
    preloaded = chosen.environ.get("LD_PRELOAD", "")
    if _intel_openmp(chosen, machine):
        libraries.append(str(machine.openmp))
        whys.append("Intel's OpenMP wakes its threads faster than GCC's")
    if machine.tcmalloc:
        libraries.append(str(machine.tcmalloc))
        whys.append("tcmalloc keeps freed memory")
    else:
        # What each step asks for anew must not go back to the kernel, which clears every page of it: docs/cpu-lora.md.
        chosen.variable(
            "MALLOC_MMAP_THRESHOLD_",
            str(max(32 << 20, scratch_bytes)),
            "no tcmalloc here (Debian: apt install libtcmalloc-minimal4): glibc told to keep freed memory instead",
        )
        chosen.variable("MALLOC_TRIM_THRESHOLD_", str(GIB), "as above")
    if libraries:
        # The user's own preloads stay, after ours.
        mine = ":".join([*libraries, *filter(None, [preloaded])])
        chosen.env["LD_PRELOAD"] = mine
        chosen.reasons.append(Reason(f"LD_PRELOAD={mine}", "; ".join(whys)))
