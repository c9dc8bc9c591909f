"""The processor that training and serving on a CPU run on, and the arithmetic that is fast on it.

A processor without instructions that multiply bfloat16 does so by way of float32, number by number: AVX2 only,
SmolLM2-135M, 16 requests at once, a server answers 36 tokens/s in bfloat16 and 109 in float32.
"""

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What Linux calls an extension in /proc/cpuinfo -> what its maker calls it; the first that is there is named.
MULTIPLIES_BF16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "svebf16": "SVE with BF16", "bf16": "Arm BF16"}
OTHERS = {"avx512f": "AVX-512 without BF16", "avx2": "AVX2", "sve": "SVE without BF16", "asimd": "Arm without BF16"}


@dataclass(frozen=True)
class Processor:
    """Its name, and the extension that decides how fast it multiplies; None where neither is known."""

    name: str
    extension: str | None
    bf16: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.extension})" if self.extension else self.name

    @property
    def dtype(self) -> str:
        """`bfloat16` or `float32`, whichever is faster here for a batch."""
        return "bfloat16" if self.bf16 else "float32"

    @property
    def why(self) -> str:
        """Why that one, in one clause."""
        if self.bf16:
            return f"{self} multiplies bfloat16 itself"
        return f"{self} has no bfloat16 multiplication: emulated, a batch takes up to three times as long"


def processor() -> Processor:
    """This machine's."""
    try:
        return described(CPUINFO.read_text(encoding="utf-8"))
    except OSError:
        return Processor(platform.processor() or platform.machine(), None, bf16=False)


def described(cpuinfo: str) -> Processor:
    """The processor of a text such as /proc/cpuinfo, of x86 or Arm; its first core stands for all."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    found = [name for flag, name in (MULTIPLIES_BF16 | OTHERS).items() if flag in flags]
    return Processor(
        fields.get("model name", platform.machine()),
        found[0] if found else None,
        bf16=bool(flags & MULTIPLIES_BF16.keys()),
    )
