"""`Scenario`: the schema of `python -m loadtest`'s flags and YAML keys, and what the Locust processes read."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from counsel.cli import load_config, option
from counsel.errors import UserError
from counsel.files import read_json
from counsel.values import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share, check_bounds
from loadtest.arrivals import PROCESSES, RATES, rate_knots
from loadtest.mix import MIXES
from loadtest.slo import parse_limit, parse_objective
from loadtest.workload import LENGTHS

_LENGTH = " | ".join(LENGTHS.values())
_TARGET, _SCHEDULE, _MODELS, _REQUESTS = "target and results", "schedule", "models", "requests"
_OBJECTIVES, _CHURN, _PROCESSES = "objectives", "churn", "processes"


@dataclass(frozen=True)
class Scenario:
    """A load test: the server, the schedule, the requests and the objectives."""

    url: str = option(
        "http://127.0.0.1:8000/v1",
        "the server's OpenAI base URL; the API key comes from COUNSEL_API_KEY",
        group=_TARGET,
        metavar="URL",
    )
    run: str = option(
        "", "run whose held-out questions are asked; its directory keeps the results", group=_TARGET, metavar="RUN"
    )
    prompts: str = option(
        "", "JSONL file of questions (key `question`), instead of --run", group=_TARGET, metavar="FILE"
    )
    out: str = option(
        "",
        "results directory",
        group=_TARGET,
        metavar="FOLDER",
        shown="runs/<run>/loadtest/<time>, without a run loadtest-<time>",
    )
    seed: NonNegativeInt = option(0, "the same seed gives the same plan", group=_TARGET)
    slo: tuple[str, ...] = option(
        (),
        "objectives, such as 'ttft_p90_s <= 2' or 'gentle: error_rate <= 0.01'",
        group=_OBJECTIVES,
        metavar="RULE,...",
    )
    goodput_slo: tuple[str, ...] = option(
        (),
        "limits that a request must meet to count as goodput, such as 'ttft_s <= 1'",
        group=_OBJECTIVES,
        metavar="RULE,...",
    )
    arrivals: Annotated[str, Literal[PROCESSES]] = option("poisson", "how requests arrive", group=_SCHEDULE)
    rate: str = option("2", "offered load: " + " | ".join(RATES.values()), group=_SCHEDULE, metavar="RATE")
    duration_s: PositiveFloat = option(60.0, "how long requests arrive", group=_SCHEDULE)
    requests: PositiveInt | None = option(
        None, "stop after this many arrivals", group=_SCHEDULE, shown="when --duration-s is over"
    )
    concurrency: PositiveInt = option(
        4, "with `closed` arrivals: clients that each wait for a reply before they ask again", group=_SCHEDULE
    )
    burstiness: PositiveFloat = option(
        0.5, "with `gamma` arrivals: shape of the gaps; below 1 bursty, 1 Poisson, above 1 even", group=_SCHEDULE
    )
    trace: str = option(
        "",
        "with `trace` arrivals: JSONL file with the key `timestamp` (seconds), and optionally model and max_tokens",
        group=_SCHEDULE,
        metavar="FILE",
    )
    trace_speed: PositiveFloat = option(
        1.0, "with `trace` arrivals: replay the trace this many times as fast", group=_SCHEDULE
    )
    warmup_s: NonNegativeFloat = option(
        0.0, "requests due before this are sent and recorded, but excluded from every metric", group=_SCHEDULE
    )
    drain_s: NonNegativeFloat = option(
        60.0, "how long running requests may take to end after the last arrival", group=_SCHEDULE
    )
    max_in_flight: PositiveInt = option(
        2000, "requests in flight at which further arrivals are dropped, and counted", group=_SCHEDULE
    )
    models: tuple[str, ...] = option(
        (), "models to ask, the hottest first", group=_MODELS, metavar="NAME,...", shown="all that the server lists"
    )
    mix: str = option("uniform", "share of each model: " + " | ".join(MIXES.values()), group=_MODELS, metavar="MIX")
    base_share: Share | None = option(
        None, "share of the base model; the mix divides the rest", group=_MODELS, shown="the base is one of the models"
    )
    cold_share: Share = option(
        0.0, "share of requests that go to the adapter unused for the longest time", group=_MODELS
    )
    output_tokens: str = option("64", f"most tokens of a reply: {_LENGTH}", group=_REQUESTS, metavar="LENGTH")
    ignore_eos: bool = option(
        False, "make every reply exactly that long, by ignoring the end of sequence", group=_REQUESTS
    )
    no_system_prompt: bool = option(
        False, "send the question alone, without the project's system prompt", group=_REQUESTS
    )
    prompt_words: str = option(
        "", f"words of a question: {_LENGTH}", group=_REQUESTS, metavar="LENGTH", shown="each question as it is"
    )
    unique_prompts: bool = option(
        True,
        "number the run and each prompt, so that the server's prefix cache does not shorten the work",
        group=_REQUESTS,
    )
    turns: str = option("1", f"turns of a conversation: {_LENGTH}", group=_REQUESTS, metavar="LENGTH")
    think_s: str = option("0", f"seconds of pause before the next turn: {_LENGTH}", group=_REQUESTS, metavar="LENGTH")
    long_share: Share = option(0.0, "share of requests with a long prompt", group=_REQUESTS)
    long_words: PositiveInt = option(600, "words of a long prompt", group=_REQUESTS)
    cancel_share: Share = option(0.0, "share of requests whose client hangs up", group=_REQUESTS)
    cancel_after_s: str = option(
        "uniform(0.5, 3)", f"seconds after which it hangs up: {_LENGTH}", group=_REQUESTS, metavar="LENGTH"
    )
    temperature: NonNegativeFloat = option(0.0, "sampling temperature", group=_REQUESTS)
    request_timeout_s: PositiveFloat = option(120.0, "longest time for one request", group=_REQUESTS)
    idle_timeout_s: PositiveFloat = option(60.0, "longest time between two chunks of a stream", group=_REQUESTS)
    reuse: bool = option(
        True, "send on connections that earlier requests left open, as browsers and most clients do", group=_REQUESTS
    )
    churn_s: NonNegativeFloat = option(
        0.0, "publish a new version of one adapter at this interval; 0: never", group=_CHURN
    )
    churn_store: str = option("store", "the server's adapter store", group=_CHURN, metavar="FOLDER")
    workers: PositiveInt = option(1, "Locust processes that send requests", group=_PROCESSES)
    bind: str = option(
        "",
        "address where workers of other machines join; then no worker is started here",
        group=_PROCESSES,
        metavar="HOST:PORT",
    )
    web: bool = option(False, "open Locust's web page during the run; end the run with Ctrl-C", group=_PROCESSES)
    web_port: Annotated[int, Ge(1), Le(65535)] = option(
        8089, "port of that page, on 127.0.0.1", group=_PROCESSES, metavar="PORT"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if (self.arrivals == "trace") != bool(self.trace):
            raise UserError(f"arrivals is {self.arrivals!r} and trace is {self.trace!r}; give both or neither")
        if self.warmup_s >= self.duration_s:
            raise UserError(f"warmup_s is {self.warmup_s:g}; it must be below duration_s, {self.duration_s:g}")
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
        """Whether each client waits for its reply before it asks again (a closed loop)."""
        return self.arrivals == "closed"

    @property
    def sources(self) -> int:
        """Locust users: the clients of a closed loop, or one source of arrivals per process."""
        return self.concurrency if self.closed else self.workers

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def host_port(option: str, text: str) -> tuple[str, int]:
    """Host and port of `text`, the value of `option`. Raises UserError unless it is HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"{option} is {text!r}; the form is HOST:PORT, such as 10.0.0.5:5557")
    return host, int(port)


def read_scenario(directory: Path) -> Scenario:
    """The scenario saved in a results directory."""
    return load_config(Scenario, None, read_json(directory / "config.json"))
