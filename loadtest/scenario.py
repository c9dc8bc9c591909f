"""What a load test is: the one dataclass behind `python -m loadtest`'s flags, its YAML keys and what Locust reads."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counsel.cli import load_config, nearest, option
from counsel.errors import UserError
from counsel.files import read_json
from loadtest.arrivals import PROCESSES, RATES, rate_knots
from loadtest.mix import MIXES
from loadtest.slo import parse_limit, parse_objective
from loadtest.workload import LENGTHS

_LENGTH = " | ".join(LENGTHS.values())


@dataclass(frozen=True)
class Scenario:
    """A load test, whole: where to, when, what, and what counts as good."""

    url: str = option("http://127.0.0.1:8000/v1", "the server's OpenAI base URL; the key comes from COUNSEL_API_KEY")
    run: str = option("", "run whose held-out questions are asked, and which keeps the results")
    prompts: str = option("", "JSONL file of questions instead (key `question`)")
    out: str = option("", "results directory (default: runs/<run>/loadtest/<time>, without a run loadtest-<time>)")
    seed: int = option(0, "same seed, same plan")
    # When
    arrivals: str = option("poisson", f"how requests arrive, one of {', '.join(PROCESSES)}")
    rate: str = option("2", "offered load: " + " | ".join(RATES.values()))
    burstiness: float = option(0.5, "shape of gamma gaps: below 1 bursty, 1 Poisson, above 1 even")
    trace: str = option("", "for trace: JSONL file with the key `timestamp` (seconds), and model, max_tokens if known")
    trace_speed: float = option(1.0, "for trace: play it this many times as fast")
    concurrency: int = option(4, "for closed: clients that each wait for a reply before asking again")
    requests: int | None = option(None, "stop after this many arrivals (default: when the time is up)")
    duration_s: float = option(60.0, "how long requests arrive")
    warmup_s: float = option(0.0, "requests due before this are sent and kept, but are in no figure")
    drain_s: float = option(60.0, "how long running requests may take to end after the last arrival")
    max_in_flight: int = option(2000, "requests in flight at which arrivals are dropped, and counted")
    request_timeout_s: float = option(120.0, "longest one request may take")
    reuse: bool = option(True, "send on connections that earlier requests left open, as browsers and most clients do")
    idle_timeout_s: float = option(60.0, "longest a stream may say nothing")
    # Whom
    models: tuple[str, ...] = option((), "models to ask, the hottest first (default: all that the server lists)")
    mix: str = option("uniform", "share of each model: " + " | ".join(MIXES.values()))
    base_share: float | None = option(
        None, "share of the base; the mix divides the rest (default: one among the models)"
    )
    cold_share: float = option(0.0, "share of requests sent to the adapter left alone longest")
    # What
    output_tokens: str = option("64", f"most tokens of a reply: {_LENGTH}")
    ignore_eos: bool = option(False, "make every reply that long (ignore the end of sequence)")
    no_system_prompt: bool = option(False, "send the question alone, without the stack's system text")
    prompt_words: str = option("", f"words of a question: {_LENGTH} (default: as they are)")
    unique_prompts: bool = option(True, "number run and prompt, so that the server's prefix cache cannot answer for it")
    turns: str = option("1", f"turns of a conversation: {_LENGTH}")
    think_s: str = option("0", f"pause before the next turn: {_LENGTH}")
    long_share: float = option(0.0, "share of requests with a long prompt")
    long_words: int = option(600, "words of a long prompt")
    cancel_share: float = option(0.0, "share of requests whose client hangs up")
    cancel_after_s: str = option("uniform(0.5, 3)", f"when it hangs up: {_LENGTH}")
    temperature: float = option(0.0, "sampling temperature")
    # What happens meanwhile
    churn_s: float = option(0.0, "publish a new version of one adapter every so often (0: never)")
    churn_store: str = option("store", "the server's adapter store, for churn")
    # What counts as good
    slo: tuple[str, ...] = option((), "objectives, such as 'ttft_p90_s <= 2' or 'gentle: error_rate <= 0.01'")
    goodput_slo: tuple[str, ...] = option((), "limits a request must keep to count as goodput, such as 'ttft_s <= 1'")
    # With what
    workers: int = option(1, "Locust processes that send")
    bind: str = option("", "HOST:PORT where workers of other machines join; then none is started here")
    web: bool = option(False, "open Locust's page during the run; end with Ctrl-C")
    web_port: int = option(8089, "port of that page, on 127.0.0.1")

    def __post_init__(self) -> None:
        if self.arrivals not in PROCESSES:
            raise UserError(f"arrivals is {self.arrivals!r}; {nearest(self.arrivals, PROCESSES)}")
        if (self.arrivals == "trace") != bool(self.trace):
            raise UserError(f"arrivals is {self.arrivals!r} and trace is {self.trace!r}; give both or neither")
        for name in ("duration_s", "request_timeout_s", "idle_timeout_s", "burstiness", "trace_speed", "concurrency",
                     "max_in_flight", "workers", "long_words"):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be a number above 0")
        for name in ("warmup_s", "drain_s", "temperature", "churn_s", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("cold_share", "long_share", "cancel_share", "base_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise UserError(f"{name} is {share:g}; it must be from 0 to 1")
        if self.warmup_s >= self.duration_s:
            raise UserError(f"warmup_s is {self.warmup_s:g}; it must be below duration_s, {self.duration_s:g}")
        if self.requests is not None and self.requests < 1:
            raise UserError(f"requests is {self.requests}; it must be at least 1")
        if self.run and self.prompts:
            raise UserError("run and prompts are both given; give one")
        if self.closed and self.concurrency < self.workers:
            raise UserError(f"concurrency is {self.concurrency}; each of the {self.workers} workers needs a client")
        if self.bind:
            host_port("bind", self.bind)
        rate_knots(self.rate, self.duration_s)
        for text in self.slo:
            parse_objective(text)
        for text in self.goodput_slo:
            parse_limit(text)

    @property
    def closed(self) -> bool:
        """Whether clients wait for their reply, instead of requests arriving on their own."""
        return self.arrivals == "closed"

    @property
    def sources(self) -> int:
        """Locust users: in a closed loop the clients, else one source of arrivals per process."""
        return self.concurrency if self.closed else self.workers

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def host_port(option: str, text: str) -> tuple[str, int]:
    """The two halves of HOST:PORT, the value of `option`; raises UserError for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"{option} is {text!r}; the form is HOST:PORT, such as 10.0.0.5:5557")
    return host, int(port)


def read_scenario(directory: Path) -> Scenario:
    """The scenario saved in a results directory."""
    return load_config(Scenario, None, read_json(directory / "config.json"))
