"""What a server is: the one dataclass behind `python -m serve`'s flags, its YAML keys, and what the child reads.

The parent resolves it once and hands it to the child as JSON in `COUNSEL_SERVE`. Secrets are never in it: keys come
hashed from a file, or from the environment (see serve/keys.py).
"""

import dataclasses
import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path

from counsel.cli import nearest, option
from counsel.errors import UserError

ENVIRONMENT = "COUNSEL_SERVE"
# What the parent calls the child it started, and where the child says it back.
INSTANCE, INSTANCE_HEADER = "COUNSEL_INSTANCE", "x-counsel-instance"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ServeConfig:
    """One base model, the store whose adapters it serves, and the bounds it keeps."""

    model: str = option("smollm2-135m", "base model: a catalog name, a hub id or a folder")
    store: str = option("store", "adapter store; what is published there is served within 2 s")
    host: str = option("127.0.0.1", "address to listen on; any other than loopback needs keys")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    # Capacity
    max_loras: int = option(
        8, "adapters that one batch may mix (they stay resident; the least recently used gives way)"
    )
    max_cpu_loras: int = option(64, "adapters kept in host memory, ready to enter a slot")
    max_lora_rank: int = option(
        64, f"largest adapter rank served, one of {', '.join(map(str, RANKS))}; lower is faster"
    )
    adapter_wait_s: float = option(
        2.0, "longest wait in seconds of an adapter for a slot that others hold; they take turns"
    )
    max_model_len: int | None = option(None, "longest prompt + answer in tokens (default: the model's, at most 4096)")
    max_num_seqs: int | None = option(None, "requests decoded together (default: by the machine)")
    dtype: str = option("auto", f"arithmetic, one of {', '.join(DTYPES)} (auto: on a CPU what is fast there)")
    compile: bool = option(True, "compile the model: faster answers, half a minute at a model's first start")
    kv_cache_memory_gb: float | None = option(None, "memory for the key-value cache in GB (default: by the machine)")
    vllm_args: str = option("", "further vLLM flags, which win over the launch plan, such as '--block-size 64'")
    # Who may ask, and how much
    keys: str = option("", "file of hashed keys, made with `python -m serve key`; reread when it changes")
    allowed_origins: tuple[str, ...] = option(
        (), "origins that browsers may call from, comma-separated (default: none)"
    )
    max_body_kb: int = option(1024, "largest request body in KiB")
    max_completion_tokens: int = option(1024, "most tokens one answer may have")
    key_running: int = option(64, "answers in the engine at a time per key; further ones wait their turn")
    key_queued: int = option(64, "answers that may wait for their turn per key before 429")
    queued: int = option(256, "answers running or waiting on the whole server before 503")
    comment_s: float = option(15.0, "seconds after which a waiting stream sends a comment line; 0: none")
    # Life
    logs: str = option("runs/serve", "folder for <port>/server.log, requests.jsonl and audit.jsonl")
    start_s: float = option(900.0, "seconds the server may take to get ready")
    leave_s: float = option(5.0, "seconds on SIGTERM in which /ready says 503 while work is still taken")
    drain_s: float = option(30.0, "seconds that running requests get to finish when the server is told to stop")
    restarts: int = option(5, "restarts in ten minutes after which a dying server is given up")

    def __post_init__(self) -> None:
        for name in ("max_loras", "max_cpu_loras", "max_body_kb", "max_completion_tokens", "key_running", "queued"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("drain_s", "leave_s", "comment_s", "restarts", "port", "key_queued"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.port > 65535:
            raise UserError(f"port is {self.port}; it must be at most 65535")
        if not self.adapter_wait_s > 0:
            raise UserError(f"adapter_wait_s is {self.adapter_wait_s}; it must be above 0")
        if self.max_lora_rank not in RANKS:
            raise UserError(f"max_lora_rank is {self.max_lora_rank}; vLLM allows {', '.join(map(str, RANKS))}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}; {nearest(self.dtype, DTYPES)}")
        if self.max_cpu_loras < self.max_loras:
            raise UserError(f"max_cpu_loras is {self.max_cpu_loras}; it must be at least max_loras, {self.max_loras}")

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
    """Whether a host name or address means this machine to itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def from_environment() -> ServeConfig:
    """The config the parent resolved for this child."""
    values = json.loads(os.environ[ENVIRONMENT])
    return ServeConfig(**{**values, "allowed_origins": tuple(values["allowed_origins"])})
