"""The server's command line and environment, chosen from a config, a base and the hardware, with a reason for each.

Pure: starts nothing and reads only the base's config.json; for int8 also its weights, which name the copy. Each choice
can be overridden: by a field of `ServeConfig`, by a vLLM flag in its `vllm_args` (they come last and win), or, for an
environment variable, by setting it before the start.
"""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from counsel.catalog import Base, weight_files
from counsel.errors import UserError
from counsel.files import read_json
from serve.accelerators import add_untested
from serve.config import DEFAULT_MAX_CPU_LORAS, DEFAULT_MAX_LORA_RANK, DEFAULT_MAX_LORAS, ServeConfig
from serve.gpu_flags import add_gpu
from serve.gpu_plan import TOKENS_PER_REQUEST
from serve.hardware import Hardware
from serve.int8_base import INT8, int8_folder
from serve.plan_builder import LaunchPlan, PlanBuilder, Reason, unserved_rank
from serve.traces import add_traces

# The entry points of this project that vLLM loads. Those of a folder that is not installed are ignored.
LOG_PRIVACY = "counsel_log_privacy"
PLUGINS = ("counsel_platform", "counsel_cpu_ops", "counsel_cpu_seeds", "counsel_adapters", LOG_PRIVACY)
THREADS_BIND, START_METHOD = "VLLM_CPU_OMP_THREADS_BIND", "VLLM_WORKER_MULTIPROC_METHOD"
EXECUTOR = "COUNSEL_CPU_EXECUTOR"
# The key of vLLM's --additional-config that serve/scheduler.py reads.
ADAPTER_WAIT_KEY = "adapter_wait_s"
DEFAULT_CONTEXT_LIMIT = 4096
# Largest HTTP request head.
HEAD_BYTES = 64 << 10
BLOCK_TOKENS = 32
FEW_CORES = 4
# A base whose float32 weights take a larger share of the memory stays in bfloat16.
FLOAT32_MEMORY_SHARE = 0.6
GIB = 1 << 30


def plan(
    config: ServeConfig,
    base: Base,
    machine: Hardware,
    ranks: Sequence[int] = (),
    targets: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> LaunchPlan:
    """How to serve `base` on `machine`.

    ranks: the ranks of the adapters in the store. targets: the layers of this base that an adapter may change, as vLLM
    names them (counsel.lora_layers); empty means every layer that vLLM can change.
    """
    _refuse_our_options(config)
    builder = PlanBuilder(environ)
    builder.flag("--model", str(served_folder(config, base, machine)))
    builder.flag("--served-model-name", base.name)
    builder.flag("--host", config.host)
    builder.flag("--port", str(config.port))
    # Several API processes would each keep their own list of adapters.
    builder.flag("--api-server-count", "1")
    builder.flag("--enable-lora")
    if machine.device == "cuda":
        add_gpu(builder, config, base, machine, ranks)
    elif machine.device == "cpu":
        _add_cpu(builder, config, base, machine, ranks)
    else:
        add_untested(builder, config, machine)
    if targets:
        why = "adapters can change all linear layers; leaving out the vocabulary saves a pass over it per token"
        builder.flag("--lora-target-modules", *targets, why=why)
    additional = json.dumps({ADAPTER_WAIT_KEY: config.adapter_wait_s})
    why = f"an adapter waits at most {config.adapter_wait_s:g} s for a slot that others hold (adapter_wait_s)"
    builder.flag("--additional-config", additional, why=why if machine.device == "cpu" else "")
    if not config.compile:
        builder.flag("--enforce-eager", why="compilation is off (no-compile): ready sooner, slower answers")
    builder.variable("VLLM_PLUGINS", ",".join(PLUGINS), "vLLM loads only the plugins of this project")
    if LOG_PRIVACY not in builder.environ.get("VLLM_PLUGINS", LOG_PRIVACY).split(","):
        builder.env["VLLM_PLUGINS"] = f"{builder.environ['VLLM_PLUGINS']},{LOG_PRIVACY}"
        builder.reasons.append(Reason(f"VLLM_PLUGINS gets {LOG_PRIVACY}", "no log holds a request's words"))
    builder.variable(
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "120", "the server keeps idle connections longer than clients' pools do"
    )
    # vLLM's strict grammars for tool calls need another backend than the one in gateway_flags.
    builder.variable("VLLM_ENFORCE_STRICT_TOOL_CALLING", "0", "a forced tool call follows its JSON schema")
    for name, value in (("VLLM_HOST_IP", "127.0.0.1"), ("GLOO_SOCKET_IFNAME", "lo")):
        builder.variable(name, value, "the engine's processes talk to each other only inside this machine")
    builder.variable("LLGUIDANCE_LOG_LEVEL", "0", "grammar errors quote requests, so they stay out of the log")
    builder.variable("VLLM_NO_USAGE_STATS", "1", "vLLM sends no usage statistics")
    add_traces(builder, config.otlp_traces_endpoint)
    if config.vllm_args:
        builder.argv += shlex.split(config.vllm_args)
        builder.reasons.append(Reason(config.vllm_args, "set with vllm_args"))
    return LaunchPlan((sys.executable, "-m", "serve.api_process", *builder.argv), builder.env, tuple(builder.reasons))


def served_folder(config: ServeConfig, base: Base, machine: Hardware) -> Path:
    """The folder that vLLM reads: the base's own, or that of its int8 copy, which may not be there yet."""
    if config.quantization == INT8 and machine.device != "cpu":
        raise UserError("quantization is int8, which is for CPUs; on a GPU choose int8_per_channel_weight_only")
    return int8_folder(base) if config.quantization == INT8 else base.path


def gateway_flags(config: ServeConfig) -> tuple[str, ...]:
    """vLLM's flags that put our gateway in front of it and close what it leaves open by default."""
    return (
        *("--middleware", "serve.gateway.Gateway"),
        *("--allowed-origins", json.dumps(config.allowed_origins)),
        *("--override-generation-config", json.dumps({"max_new_tokens": config.max_completion_tokens})),
        # Where the grammar allows whitespace, a small model may write it without end.
        *("--structured-outputs-config", json.dumps({"backend": "guidance", "disable_any_whitespace": True})),
        # vLLM fetches nothing for a caller, even if such a request got through the gateway.
        *("--allowed-media-domains", "nothing.invalid"),
        *("--h11-max-incomplete-event-size", str(HEAD_BYTES)),
        "--disable-fastapi-docs",
        "--disable-uvicorn-access-log",
    )


def _refuse_our_options(config: ServeConfig) -> None:
    """Thread binding, memory and the check of GPUs depend on these, so they are not taken from vllm_args."""
    for word in shlex.split(config.vllm_args):
        name = {"-tp": "--tensor-parallel-size", "-dp": "--data-parallel-size"}.get(word, word.partition("=")[0])
        if name in ("--tensor-parallel-size", "--data-parallel-size"):
            raise UserError(f"vllm_args holds {word}; give {name} as an option of its own, without --vllm-args")


def _add_cpu(builder: PlanBuilder, config: ServeConfig, base: Base, machine: Hardware, ranks: Sequence[int]) -> None:
    if config.quantization == INT8:
        why = "linear layers in int8 (quantization), made once and kept; adapters are added to their output in 16 bits"
        builder.note("quantized base", why)
    elif config.quantization:
        raise UserError(
            f"quantization is {config.quantization}, which needs a GPU; on a CPU it can be {INT8}, or left out"
        )
    copies, split = config.data_parallel_size or 1, config.tensor_parallel_size or 1
    if copies * split > len(machine.cpus):
        raise UserError(
            f"data_parallel_size {copies} times tensor_parallel_size {split} needs {copies * split} cores; "
            f"there are {len(machine.cpus)}"
        )
    if split > 1:
        builder.flag("--tensor-parallel-size", str(split), why="set with tensor_parallel_size")
    if copies > 1:
        why = "set with data_parallel_size; every adapter is loaded into each copy"
        builder.flag("--data-parallel-size", str(copies), why=why)
    _add_lora(builder, config, ranks)
    model_config = read_json(Path(base.path) / "config.json")
    shape = model_config.get("text_config", model_config)
    max_num_seqs = config.max_num_seqs or min(256, 32 * max(1, len(machine.cpus) // copies))
    dtype = _add_dtype(builder, config, base, model_config, machine)
    _add_capacity(builder, config, shape, max_num_seqs, machine, itemsize=4 if dtype == "float32" else 2)
    if config.compile and machine.compiler is None:
        why = "compilation is off because g++ is missing (Debian: apt install g++): ready sooner, slower answers"
        builder.flag("--enforce-eager", why=why)
    _add_threads(builder, machine, copies * split)
    # Sampling sorts every running request's scores of the whole vocabulary; the order takes 8 bytes per score.
    _add_preloads(builder, machine, scratch_bytes=max_num_seqs * shape["vocab_size"] * 8)


def _add_lora(builder: PlanBuilder, config: ServeConfig, ranks: Sequence[int]) -> None:
    max_loras = config.max_loras or min(DEFAULT_MAX_LORAS, config.max_cpu_loras or DEFAULT_MAX_LORAS)
    max_cpu_loras = config.max_cpu_loras or max(max_loras, DEFAULT_MAX_CPU_LORAS)
    max_lora_rank = config.max_lora_rank or DEFAULT_MAX_LORA_RANK
    builder.flag("--max-loras", str(max_loras), why=f"one batch can mix {max_loras} adapters (max_loras)")
    why = f"{max_cpu_loras} adapters stay in host memory (max_cpu_loras)"
    builder.flag("--max-cpu-loras", str(max_cpu_loras), why=why)
    why = unserved_rank(ranks, max_lora_rank)
    why = why or "a higher limit costs memory but no time: each adapter is computed at its own rank (max_lora_rank)"
    builder.flag("--max-lora-rank", str(max_lora_rank), why=why)


def _add_dtype(
    builder: PlanBuilder, config: ServeConfig, base: Base, model_config: Mapping[str, Any], machine: Hardware
) -> str:
    dtype, why = config.dtype, "set with dtype" if config.dtype != "auto" else "the model's own config decides"
    # The kernels of a quantized base determine its dtype.
    if dtype == "auto" and "quantization_config" not in model_config:
        dtype, why = machine.processor.dtype, machine.processor.why
        # Published weights take 2 bytes per number, except where their config has float32.
        stored = model_config.get("dtype", model_config.get("torch_dtype"))
        weights = sum(file.stat().st_size for file in weight_files(base.path)) * (1 if stored == "float32" else 2)
        weights *= config.data_parallel_size or 1
        if dtype == "float32" and weights > machine.memory_bytes * FLOAT32_MEMORY_SHARE:
            dtype = "bfloat16"
            why = (
                "this processor is slow at bfloat16, "
                f"but float32 would fill {weights / GIB:.0f} of {machine.memory_bytes / GIB:.0f} GiB"
            )
    builder.flag("--dtype", dtype, why=why)
    return dtype


def _add_capacity(
    builder: PlanBuilder,
    config: ServeConfig,
    shape: Mapping[str, int],
    max_num_seqs: int,
    machine: Hardware,
    itemsize: int,
) -> None:
    """Context length, running requests, tokens per step, key-value memory."""
    model_limit = shape.get("max_position_embeddings", DEFAULT_CONTEXT_LIMIT)
    max_model_len = config.max_model_len or min(DEFAULT_CONTEXT_LIMIT, model_limit)
    why = "set with max_model_len" if config.max_model_len else f"the model's limit, up to {DEFAULT_CONTEXT_LIMIT}"
    builder.flag("--max-model-len", str(max_model_len), why=why)
    copies, split = config.data_parallel_size or 1, config.tensor_parallel_size or 1
    cores = max(1, len(machine.cpus) // copies)
    why = "set with max_num_seqs"
    if not config.max_num_seqs:
        why = f"32 per core, on {cores} cores; more would slow each answer down without more tokens in total"
    builder.flag("--max-num-seqs", str(max_num_seqs), why=why)
    why = "a step that reads prompt tokens delays every running answer; this many take about half a second"
    builder.flag("--max-num-batched-tokens", str(max(max_num_seqs, min(2048, 256 * cores))), why=why)
    why = "requests share prefixes in whole blocks; vLLM's blocks of 128 tokens are longer than most system prompts"
    builder.flag("--block-size", str(BLOCK_TOKENS), why=why)
    if config.kv_cache_memory_gb:
        kv_bytes, why = int(config.kv_cache_memory_gb * 1e9), "set with kv_cache_memory_gb"
    else:
        kv_bytes = _kv_bytes(shape, max_model_len, max_num_seqs, machine, itemsize) // split
        kv_bytes = min(kv_bytes, machine.memory_bytes // 4 // (copies * split))
        why = (
            f"{kv_bytes / GIB:.1f} GiB, for {max_num_seqs} requests of {TOKENS_PER_REQUEST} tokens, "
            "but at most a quarter of the memory"
        )
    builder.flag("--kv-cache-memory-bytes", str(kv_bytes), why=why)


def _kv_bytes(shape: Mapping[str, int], max_model_len: int, max_num_seqs: int, machine: Hardware, itemsize: int) -> int:
    heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
    head_size = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    token_bytes = 2 * itemsize * shape["num_hidden_layers"] * heads * head_size
    # One request of full length must fit. More memory also costs time, because the server touches all of it at start.
    wanted = token_bytes * max(max_model_len, max_num_seqs * TOKENS_PER_REQUEST)
    return min(max(wanted, GIB // 4), machine.memory_bytes // 4)


def _add_threads(builder: PlanBuilder, machine: Hardware, n_ranks: int) -> None:
    if n_ranks > 1:
        groups = [machine.cpus[rank::n_ranks] for rank in range(n_ranks)]
        value = "|".join(",".join(map(str, group)) for group in groups)
        builder.variable(THREADS_BIND, value, f"{n_ranks} processes compute, each on its own cores")
        return
    if len(machine.cpus) > FEW_CORES:
        builder.variable(THREADS_BIND, "auto", "vLLM binds one thread to each core and leaves one core free")
        return
    why = f"all {len(machine.cpus)} cores compute; vLLM would leave one free, which costs too much on so few"
    builder.variable(THREADS_BIND, ",".join(map(str, machine.cpus)), why)
    # In a forked process GCC's OpenMP hangs, and Intel's binds its threads to all cores in order, whatever was set.
    if _can_preload_openmp(builder, machine) and THREADS_BIND in builder.env:
        why = "forked engine processes inherit what the first process imported: the server is ready in half the time"
        builder.variable(START_METHOD, "fork", why)
        why = "the model runs in the scheduler's process; two processes would spin on a core to hand over each step"
        builder.variable(EXECUTOR, "uni", why)


def _can_preload_openmp(builder: PlanBuilder, machine: Hardware) -> bool:
    # vLLM refuses to start with two OpenMP libraries.
    return machine.openmp is not None and "libgomp" not in builder.environ.get("LD_PRELOAD", "")


def _add_preloads(builder: PlanBuilder, machine: Hardware, scratch_bytes: int) -> None:
    libraries, whys = [], []
    preloaded = builder.environ.get("LD_PRELOAD", "")
    if _can_preload_openmp(builder, machine):
        libraries.append(str(machine.openmp))
        whys.append("Intel's OpenMP wakes its threads faster than GCC's")
    if machine.tcmalloc:
        libraries.append(str(machine.tcmalloc))
        whys.append("tcmalloc keeps freed memory")
    else:
        # Memory that every step allocates must not go back to the kernel, which clears each page: docs/cpu-lora.md.
        why = "glibc keeps freed memory, because tcmalloc is missing (Debian: apt install libtcmalloc-minimal4)"
        builder.variable("MALLOC_MMAP_THRESHOLD_", str(max(32 << 20, scratch_bytes)), why)
        builder.variable("MALLOC_TRIM_THRESHOLD_", str(GIB), why)
    if libraries:
        # What the user preloads stays, after ours.
        value = ":".join([*libraries, *filter(None, [preloaded])])
        builder.env["LD_PRELOAD"] = value
        builder.reasons.append(Reason(f"LD_PRELOAD={value}", "; ".join(whys)))
