"""`ServeConfig`: the schema of `python -m serve`'s flags and YAML keys, and what its child processes read.

The parent resolves it once and hands it to the child as JSON in `COUNSEL_SERVE`. It never holds secrets: keys come
hashed from a file, or from the environment (see serve/keys.py).
"""

import dataclasses
import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from counsel.adapter_check import SERVED_RANKS
from counsel.cli import option
from counsel.errors import UserError
from counsel.values import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check_bounds

ENVIRONMENT = "COUNSEL_SERVE"
# vLLM's ways to quantize an unquantized base on a GPU (serve/quantization.py), and ours on a CPU (serve/int8_base.py).
GPU_QUANTIZATIONS = ("fp8", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8_per_channel_weight_only")
QUANTIZATIONS = (*GPU_QUANTIZATIONS, "int8")
# The parent names each child it starts in INSTANCE; the child answers with that name in INSTANCE_HEADER.
INSTANCE, INSTANCE_HEADER = "COUNSEL_INSTANCE", "x-counsel-instance"

# What a CPU server takes, and the most that a GPU server takes by itself.
DEFAULT_MAX_LORAS, DEFAULT_MAX_CPU_LORAS, DEFAULT_MAX_LORA_RANK = 8, 64, 64

_MODEL, _ADAPTERS, _ACCESS, _LIMITS, _LIFETIME = "model", "adapters", "address and access", "limits", "start and stop"
_SAFETY = "crisis gate"


@dataclass(frozen=True)
class ServeConfig:
    """One base model, the store whose adapters it serves, and the server's limits."""

    model: str = option(
        "smollm2-135m", "base model: a catalog name, a hub id or a local folder", group=_MODEL, metavar="MODEL"
    )
    dtype: Annotated[str, Literal["auto", "float32", "bfloat16", "float16"]] = option(
        "auto", "number format of weights and arithmetic; auto takes the fastest one on a CPU", group=_MODEL
    )
    max_model_len: PositiveInt | None = option(
        None, "longest prompt and answer together, in tokens", group=_MODEL, shown="the model's, at most 4096"
    )
    max_num_seqs: PositiveInt | None = option(
        None, "requests decoded together", group=_MODEL, shown="set from the machine"
    )
    kv_cache_memory_gb: PositiveFloat | None = option(
        None, "memory for the key-value cache", group=_MODEL, shown="set from the machine"
    )
    tensor_parallel_size: PositiveInt | None = option(
        None,
        "GPUs (on a CPU: processes) that share one copy of the model",
        group=_MODEL,
        shown="set from the GPUs; 1 on a CPU",
    )
    data_parallel_size: PositiveInt | None = option(
        None, "copies of the model, each with every adapter", group=_MODEL, shown="set from the GPUs; 1 on a CPU"
    )
    quantization: Annotated[str, Literal[QUANTIZATIONS]] | None = option(
        None,
        "quantize the weights: int8 on a CPU, once, into the cache; the others on a GPU, while they are loaded",
        group=_MODEL,
        shown="as the base's files are",
    )
    compile: bool = option(
        True, "compile the model: faster answers, half a minute at a model's first start", group=_MODEL
    )
    vllm_args: str = option(
        "",
        "further vLLM flags, which override the launch plan, such as '--block-size 64'",
        group=_MODEL,
        metavar="FLAGS",
    )
    untested_vllm: bool = option(False, "start on a vLLM release that this project was not tested with", group=_MODEL)
    store: str = option(
        "store", "adapter store; the server loads what is published there within 2 s", group=_ADAPTERS, metavar="FOLDER"
    )
    max_loras: PositiveInt | None = option(
        None,
        "adapters that one batch may mix; they stay loaded until the least recently used is evicted",
        group=_ADAPTERS,
        shown=f"{DEFAULT_MAX_LORAS}, or fewer where a GPU has less room",
    )
    max_cpu_loras: PositiveInt | None = option(
        None,
        "adapters kept in host memory, ready to load; at least --max-loras",
        group=_ADAPTERS,
        shown=f"{DEFAULT_MAX_CPU_LORAS}, or fewer where a GPU server's host has less room",
    )
    max_lora_rank: Annotated[int, Literal[SERVED_RANKS]] | None = option(
        None,
        "largest adapter rank served; a higher one takes more memory, and on a GPU more time",
        group=_ADAPTERS,
        shown=f"{DEFAULT_MAX_LORA_RANK}; on a GPU the store's largest",
    )
    adapter_wait_s: PositiveFloat = option(
        2.0, "longest time an adapter waits while others occupy every slot; then they take turns", group=_ADAPTERS
    )
    preload: str = option(
        "",
        "file with the names of adapters to load before others, one per line; reread when it changes. A fleet writes "
        "one for each replica",
        group=_ADAPTERS,
        metavar="FILE",
    )
    host: str = option(
        "127.0.0.1",
        "address to listen on; any address other than loopback requires --keys",
        group=_ACCESS,
        metavar="ADDRESS",
    )
    port: Annotated[int, Ge(0), Le(65535)] = option(8000, "port to listen on; 0 takes a free one", group=_ACCESS)
    keys: str = option(
        "",
        "file of hashed keys, made with `python -m serve key`; reread when it changes",
        group=_ACCESS,
        metavar="FILE",
    )
    metrics_port: Annotated[int, Ge(0), Le(65535)] = option(
        0,
        "port on --metrics-host where /metrics and /v1/adapters need no key; 0: none",
        group=_ACCESS,
    )
    metrics_host: str = option(
        "127.0.0.1", "loopback or private address of --metrics-port", group=_ACCESS, metavar="ADDRESS"
    )
    otlp_traces_endpoint: str = option(
        "",
        "OpenTelemetry collector that gets a span per request, such as http://127.0.0.1:4317",
        group=_ACCESS,
        metavar="URL",
        shown="none",
    )
    allowed_origins: tuple[str, ...] = option(
        (), "origins that browsers may call from, comma-separated", group=_ACCESS, metavar="ORIGIN,...", shown="none"
    )
    ui: bool = option(False, "chat page for people, at /ui", group=_ACCESS)
    votes: str = option(
        "runs/votes",
        "folder for votes.jsonl, what people say about answers on the chat page",
        group=_ACCESS,
        metavar="FOLDER",
    )
    max_completion_tokens: PositiveInt = option(1024, "most tokens of one answer", group=_LIMITS)
    max_body_kb: PositiveInt = option(1024, "largest request body", group=_LIMITS)
    key_running: PositiveInt = option(
        64, "answers per key that the engine works on at a time; further ones wait", group=_LIMITS
    )
    key_queued: NonNegativeInt = option(
        64, "answers per key that may wait; further requests get status 429", group=_LIMITS
    )
    queued: PositiveInt = option(
        256, "answers running or waiting on the whole server; further requests get status 503", group=_LIMITS
    )
    comment_s: NonNegativeFloat = option(
        15.0, "seconds after which a waiting stream sends a comment line; 0: never", group=_LIMITS
    )
    safety: str = option(
        "on",
        "on, off (for research: no message and no answer is checked), or a policy file (YAML)",
        group=_SAFETY,
        metavar="ON|OFF|FILE",
    )
    logs: str = option(
        "runs/serve", "folder for <port>/server.log, requests.jsonl and audit.jsonl", group=_LIFETIME, metavar="FOLDER"
    )
    start_s: NonNegativeFloat = option(900.0, "longest time the server may take to become ready", group=_LIFETIME)
    leave_s: NonNegativeFloat = option(
        5.0, "time after SIGTERM in which /ready returns 503 while new requests are still served", group=_LIFETIME
    )
    drain_s: NonNegativeFloat = option(
        30.0, "time that running requests get to finish when the server stops", group=_LIFETIME
    )
    restarts: NonNegativeInt = option(
        5, "restarts in ten minutes after which a server that keeps dying is given up", group=_LIFETIME
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.max_cpu_loras and self.max_loras and self.max_cpu_loras < self.max_loras:
            raise UserError(f"max_cpu_loras is {self.max_cpu_loras}; it must be at least max_loras, {self.max_loras}")
        if not _is_private(self.metrics_host):
            raise UserError(
                f"metrics_host is {self.metrics_host!r}; no key is needed there, so it must be one loopback or private "
                "address, such as 10.0.0.5"
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def log_dir(self) -> Path:
        return Path(self.logs) / str(self.port)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is loopback: reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_private(host: str) -> bool:
    """Whether an address is this machine's own or a private network's, and is one address, not all of them."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_private and not address.is_unspecified


def from_environment() -> ServeConfig:
    """The config that the parent resolved for this child."""
    values = json.loads(os.environ[ENVIRONMENT])
    return ServeConfig(**{**values, "allowed_origins": tuple(values["allowed_origins"])})
