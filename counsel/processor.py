"""The CPU of this machine, and the dtype that is faster on it for training and serving.

Without bfloat16 instructions a CPU converts each value to float32 to multiply it. On a CPU with AVX2 only, a server of
SmolLM2-135M with 16 concurrent requests generates 36 tokens/s in bfloat16 and 109 in float32.
"""

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Linux's name of an extension in /proc/cpuinfo -> the maker's name. Of several, the first is shown.
MULTIPLIES_BF16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "svebf16": "SVE with BF16", "bf16": "Arm BF16"}
OTHERS = {"avx512f": "AVX-512 without BF16", "avx2": "AVX2", "sve": "SVE without BF16", "asimd": "Arm without BF16"}


@dataclass(frozen=True)
class Processor:
    """A CPU's name, and the extension that decides how fast it multiplies matrices (None: unknown)."""

    name: str
    extension: str | None
    bf16: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.extension})" if self.extension else self.name

    @property
    def dtype(self) -> str:
        """`bfloat16` or `float32`, whichever is faster for a batch."""
        return "bfloat16" if self.bf16 else "float32"

    @property
    def why(self) -> str:
        """The reason for `dtype`."""
        if self.bf16:
            return f"{self} multiplies bfloat16 in hardware"
        return f"{self} has no bfloat16 multiplication: emulated, a batch takes up to three times as long"


def processor() -> Processor:
    """The CPU of this machine."""
    try:
        return described(CPUINFO.read_text(encoding="utf-8"))
    except OSError:
        return Processor(platform.processor() or platform.machine(), None, bf16=False)


def described(cpuinfo: str) -> Processor:
    """The CPU that /proc/cpuinfo describes, on x86 or Arm, from the entry of its first core."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    extensions = [name for flag, name in (MULTIPLIES_BF16 | OTHERS).items() if flag in flags]
    return Processor(
        fields.get("model name", platform.machine()),
        extensions[0] if extensions else None,
        bf16=bool(flags & MULTIPLIES_BF16.keys()),
    )
