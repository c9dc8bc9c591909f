"""The whole story on one small real model, in the order a user would type it: `make demo`.

    serve the base -> fine-tune -> hot-load the adapter into the running server -> evaluate -> load-test -> report

Everything goes through the four commands (`python -m train|eval|loadtest`, and serve's own context manager), so what
is shown here is what users get. Safe to run twice: a finished training run is kept, and the demo says so.
"""

import base64
import html
import json
import subprocess
import sys
import time
from pathlib import Path
from string import Template
from typing import Any

from counsel.chat import NOTICE
from counsel.cli import exit_status
from counsel.client import make_client
from counsel.errors import UserError
from counsel.files import read_json, read_jsonl, write_text
from counsel.run import RUNS, Run
from serve.config import ServeConfig
from serve.server import Server

BASE, NAME = "smollm2-135m", "demo"
RUN = Run(RUNS / NAME)
SEEN_WITHIN_S = 30.0


def main() -> int:
    started = time.monotonic()
    print(f"{NOTICE}\n")
    step(f"1/5 serve {BASE}")
    with Server(ServeConfig(model=BASE, port=0)) as server:
        step("2/5 fine-tune an adapter on the shipped conversations")
        train()
        step("3/5 hot-load it into the running server")
        hot_load(server)
        step("4/5 evaluate base and adapter on held-out questions")
        evaluation = command(
            "eval", "--run", NAME, "--url", server.base_url, "--models", f"base,{NAME}", "--no-baselines",
            "--questions", "14", "--max-tokens", "256", "--temperature", "0.3", "--references", "2",
        )  # fmt: skip
        step("5/5 load-test both for 20 s")
        load = command(
            "loadtest", "--run", NAME, "--url", server.base_url, "--models", f"{BASE},{NAME}",
            "--duration-s", "20", "--rate", "1.5", "--output-tokens", "48",
            accept=(0, 4),
        )  # fmt: skip
    rows = comparison(evaluation, load)
    print("\n" + table(rows))
    for reason in load["invalid"]:
        print(f"the load test is not to be trusted: {reason}")
    report = RUN.path / "report.html"
    write_text(report, page(rows, evaluation, load["invalid"]))
    print(f"\nwhole demo: {time.monotonic() - started:.0f} s. Read the answers side by side in")
    print(report.resolve())
    print(f"next: python -m serve --model {BASE}, and in another terminal python -m serve chat {NAME}")
    return 0


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def train() -> None:
    """Train, go on with training that was cut short, or say that it is done already."""
    if RUN.complete:
        print(f"skipped: {RUN.path} is a finished run (remove it to train again)")
        return
    command("train", NAME, *(["--resume"] if (RUN.path / "config.json").is_file() else []))


def hot_load(server: Server) -> None:
    """Wait until the running server lists the adapter. Publishing was the last thing that training did."""
    client = make_client(server.base_url)
    started = time.monotonic()
    while NAME not in (served := [model.id for model in client.models.list()]):
        if time.monotonic() - started > SEEN_WITHIN_S:
            raise UserError(f"{NAME!r} is not served after {SEEN_WITHIN_S:.0f} s, only {served}; see {server.log}")
        time.sleep(0.2)
    print(f"no restart: /v1/models lists {', '.join(served)} ({time.monotonic() - started:.1f} s after publishing)")


def command(package: str, *words: str, accept: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run one of the stack's commands in front of the user; return the JSON document it ends with.

    A load test that ends with 2 measured something, but says that its figures are not to be trusted: the page says so.
    """
    print(f"$ python -m {package} {' '.join(words)}", flush=True)
    argv = [sys.executable, "-m", package, *words]
    held = ""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, encoding="utf-8", bufsize=1) as process:
        assert process.stdout is not None
        for line in process.stdout:
            # Only what may be the document is held back, until a line behind it shows that it is not.
            print(held, end="", flush=True)
            held = line if line.startswith("{") else ""
            if not held:
                print(line, end="", flush=True)
    if process.returncode not in accept or not held:
        raise UserError(f"python -m {package} ended with status {process.returncode}; what it said is above")
    document: dict[str, Any] = json.loads(held)
    return document


def comparison(evaluation: dict[str, Any], load: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, base, adapter) rows: quality from the evaluation, speed from the load test."""

    def quality(metric: str, arm: str) -> str:
        found = evaluation["arms"][arm]["metrics"].get(metric)
        return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else "-"

    def speed(arm: str, figure: str, percentile: str | None, scale: float, digits: int) -> str:
        found = load["models"].get(arm, {}).get(figure)
        found = found[percentile] if found and percentile else found
        return "-" if found is None else f"{found * scale:.{digits}f}"

    rows = [
        (title, quality(metric, BASE), quality(metric, NAME))
        for title, metric in (
            ("bits per byte of people's answers, lower is better", "bits_per_byte"),
            ("similarity to people's answers, best of several", "similarity_max"),
            ("similarity to people's answers, mean", "similarity_mean"),
        )
    ]
    for title, figure, percentile, scale, digits in (
        ("time to first token, p50 ms", "ttft_s", "p50", 1000, 0),
        ("time to first token, p90 ms", "ttft_s", "p90", 1000, 0),
        ("time per output token, p50 ms", "tpot_s", "p50", 1000, 1),
        ("requests answered", "ok", None, 1, 0),
        ("requests failed", "errors", None, 1, 0),
    ):
        rows.append((title, *(speed(arm, figure, percentile, scale, digits) for arm in (BASE, NAME))))
    return rows


def table(rows: list[tuple[str, str, str]]) -> str:
    lines = [("", BASE, NAME), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in lines)


def page(rows: list[tuple[str, str, str]], evaluation: dict[str, Any], doubts: list[str]) -> str:
    """The report: one HTML file that needs nothing beside it."""
    summary = read_json(RUN.path / "train.json")
    picture = base64.b64encode((RUN.path / "loss.png").read_bytes()).decode("ascii")
    questions = {row["question_id"]: row["question"] for row in RUN.split("test")}
    answers: dict[str, dict[str, str]] = {}
    for row in read_jsonl(Path(evaluation["folder"]) / "samples.jsonl"):
        text = row["text"] + (" … (cut at the longest length allowed)" if row["finish_reason"] == "length" else "")
        answers.setdefault(row["question_id"], {}).setdefault(row["arm"], text)
    shown = [key for key, arms in sorted(answers.items()) if {BASE, NAME} <= arms.keys()][:3]
    return PAGE.substitute(
        notice=html.escape(NOTICE),
        base=BASE,
        name=NAME,
        steps=summary["steps"],
        seconds=round(summary["wall_s"]),
        tokens_per_s=round(summary["tokens_per_s"]),
        picture=picture,
        questions=evaluation["questions"],
        doubts=html.escape(" ".join(f"Not to be trusted: {doubt}." for doubt in doubts)),
        rows="".join(f"<tr><td>{html.escape(a)}<td>{html.escape(b)}<td>{html.escape(c)}" for a, b, c in rows),
        answers="".join(
            f"<h3>{html.escape(questions[key])}</h3><div class=pair>"
            + "".join(f"<div><b>{arm}</b>{html.escape(answers[key][arm])}</div>" for arm in (BASE, NAME))
            + "</div>"
            for key in shown
        ),
    )


PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Counsel Stack demo: $base and $name</title>
<style>
  body { font: 16px/1.55 system-ui, sans-serif; color: #1f2933; background: #fbfbf9; max-width: 60rem;
         margin: 0 auto; padding: 2rem 1rem 4rem }
  h1 { font-size: 1.6rem } h2 { margin-top: 2.5rem; font-size: 1.2rem } h3 { font-size: 1rem; margin: 1.6rem 0 .5rem }
  .notice { border-left: 4px solid #d9822b; background: #fff6e9; padding: .7rem 1rem }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
  th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #e4e7eb }
  th:first-child, td:first-child { text-align: left }
  img { max-width: 100%; border: 1px solid #e4e7eb; background: #fff }
  .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
  .pair div { white-space: pre-wrap; background: #fff; border: 1px solid #e4e7eb; padding: .8rem 1rem }
  .pair b { display: block; color: #0b7285; margin-bottom: .4rem }
  @media (max-width: 40rem) { .pair { grid-template-columns: 1fr } }
</style>
<h1>Base and adapter, side by side</h1>
<p class="notice">$notice</p>
<h2>What changed</h2>
<table><tr><th><th>$base<th>$name$rows</table>
<p>$questions held-out questions; in brackets, 95 % intervals by question. Latencies come from 20 s of open-loop load on
this machine. $doubts A shipped sample set this small shows that the path works, not how good an adapter can be.</p>
<h2>How it learned</h2>
<p>$steps steps in $seconds s ($tokens_per_s tokens/s).</p>
<img alt="training and validation loss by step" src="data:image/png;base64,$picture">
<h2>Three held-out questions</h2>
$answers
</html>
""")


if __name__ == "__main__":
    sys.exit(exit_status(main))
