"""`EvalConfig`: the schema of an evaluation's flags and YAML, checked before anything starts."""

import dataclasses
import re
from dataclasses import dataclass

from counsel.cli import argument, option
from counsel.errors import UserError


@dataclass(frozen=True)
class EvalConfig:
    """What one evaluation asks, of whom, and how."""

    run: str = option(dataclasses.MISSING, "the run whose held-out questions are asked: a name or a folder")
    url: str = option("http://127.0.0.1:8000/v1", "the OpenAI-compatible server")
    models: tuple[str, ...] = option(
        (), "served names, comma-separated (`base`: the base model); base and the run's own adapter when empty"
    )
    questions: int = option(60, "how many held-out questions; a smaller number is always a subset of a larger one")
    samples: int = option(1, "answers per question and model")
    references: int = option(3, "reference answers per question that the likelihood is measured on, at most")
    max_tokens: int = option(128, "longest answer, in tokens")
    temperature: float = option(0.7, "sampling temperature")
    top_p: float = option(0.95, "nucleus sampling")
    seed: int = option(0, "of sampling and of the bootstrap")
    concurrency: int = option(16, "requests in flight")
    timeout_s: float = option(120.0, "longest wait for one request")
    baselines: bool = option(True, "also ask the base without the system prompt and with two worked examples")

    def __post_init__(self) -> None:
        for name, least in {
            "questions": 2,
            "samples": 1,
            "references": 1,
            "max_tokens": 1,
            "concurrency": 1,
            "seed": 0,
        }.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.temperature <= 2:
            raise UserError(f"temperature is {self.temperature}; it must be between 0 and 2")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.timeout_s <= 0:
            raise UserError(f"timeout_s is {self.timeout_s}; it must be above 0")


@dataclass(frozen=True)
class ReportConfig:
    """Which evaluation to score and report again."""

    folder: str = argument("an evaluation's folder: runs/<name>/eval/<stamp>")


@dataclass(frozen=True)
class CompareConfig:
    """Which evaluated models to compare."""

    sides: tuple[str, ...] = argument(
        "evaluated models, comma-separated: RUN or FOLDER, with :ARM where there are several"
    )
    seed: int = option(0, "of the bootstrap")

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be at least 0")


@dataclass(frozen=True)
class GateConfig:
    """What a finished evaluation must show."""

    side: str = argument("the evaluated model: RUN or FOLDER, with :ARM where there are several")
    rules: tuple[str, ...] = option(
        ("difference.bits_per_byte.high<0", "errors<=0"), "conditions, comma-separated (see eval/gate.py)"
    )


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges which answers."""

    folder: str = argument("a finished evaluation: RUN (its latest one) or FOLDER")
    model: str = option(dataclasses.MISSING, "the judge, by the name its server knows")
    url: str = option("http://127.0.0.1:8000/v1", "the judge's OpenAI-compatible server")
    arms: tuple[str, ...] = option((), "two arms, comma-separated: the second against the first (base, the adapter)")
    labels: str = option("", "file of human labels to measure the judge by (see eval/judge/agreement.py)")
    max_tokens: int = option(400, "longest reply, in tokens")
    seed: int = option(0, "of the bootstrap")
    concurrency: int = option(16, "requests in flight")
    timeout_s: float = option(120.0, "longest wait for one request")

    def __post_init__(self) -> None:
        if len(self.arms) not in (0, 2) or len(set(self.arms)) != len(self.arms):
            raise UserError(f"arms is {','.join(self.arms)!r}; give two different ones, such as base,gentle")
        for name, least in {"max_tokens": 1, "concurrency": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.timeout_s <= 0:
            raise UserError(f"timeout_s is {self.timeout_s}; it must be above 0")


@dataclass(frozen=True)
class BatchConfig:
    """A file of requests to answer, who answers them, and the file to answer into."""

    requests: str = argument("OpenAI Batch file: one request a line")
    answers: str = argument("file to write the answers to; what it holds already is not asked again")
    url: str = option("", "the OpenAI-compatible server that answers (default: http://127.0.0.1:8000/v1)")
    base: str = option("", "answer without a server, on an engine of this command's own with this base model")
    store: str = option("", "with --base: adapter store whose adapters the requests may name (default: store)")
    engine: str = option(
        "", "with --base: YAML file of settings as for `python -m serve` (dtype, max_lora_rank, max_loras ...)"
    )
    shard: str = option("", "K/N, such as 1/4: answer only the Kth of N parts of the requests, into a file of its own")
    concurrency: int | None = option(None, "requests in flight (default: 32, or 2048 with --base)")
    timeout_s: float = option(600.0, "longest wait for one answer of a server")

    def __post_init__(self) -> None:
        if self.url and self.base:
            raise UserError("url and base exclude each other: give --url for a server, or --base for an engine")
        for name in ("store", "engine"):
            if getattr(self, name) and not self.base:
                raise UserError(f"{name} is {getattr(self, name)!r}, but only an engine has one: give --base MODEL too")
        if self.concurrency is not None and self.concurrency < 1:
            raise UserError(f"concurrency is {self.concurrency}; it must be at least 1")
        if self.shard and self.part is None:
            raise UserError(f"shard is {self.shard!r}; it must be K/N with K from 1 to N, such as 1/4")

    @property
    def part(self) -> tuple[int, int] | None:
        """(K, N) of `shard`; None where it is not given, or is not such a pair."""
        found = re.fullmatch(r"([1-9][0-9]{0,4})/([1-9][0-9]{0,4})", self.shard)
        return (int(found[1]), int(found[2])) if found and int(found[1]) <= int(found[2]) else None
