"""The whole stack on one small real model, in the order a user would run it: `make demo`.

    serve the base -> fine-tune -> hot-load the adapter into the running server -> evaluate -> load-test -> report

The demo runs the same commands that users do (`python -m train|eval|loadtest`) against a server from serve.server.
It can be run again: a finished training run is kept.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from counsel.chat import NOTICE
from counsel.cli import exit_status
from counsel.client import make_client
from counsel.errors import UserError
from counsel.files import read_jsonl, write_text
from counsel.report import answer_columns, page, section
from counsel.report.charts import chart
from counsel.report.tables import text_table
from counsel.run import RUNS, Run
from eval.report import evaluation_finding, label, with_interval
from loadtest.table import milliseconds
from serve.config import ServeConfig
from serve.server import Server
from train.plot import draw_losses

BASE, NAME = "smollm2-135m", "demo"
RUN = Run(RUNS / NAME)
LISTED_WITHIN_S = 30.0
LOAD_S = 20
# Chosen with the recipe by reading answers blind (docs/lab/2026-11-27-demo-answers.md). Without the penalty a model of
# this size repeats itself at a low temperature.
SAMPLING = {"temperature": "0.3", "top-p": "0.9", "repetition-penalty": "1.1", "max-tokens": "400"}


def main() -> int:
    started = time.monotonic()
    print(f"{NOTICE}\n")
    step(f"1/5 Serve {BASE}")
    # Off, because the evaluation measures the models alone.
    with Server(ServeConfig(model=BASE, port=0, safety="off")) as server:
        step("2/5 Fine-tune an adapter on the conversations that come with the project")
        train()
        step("3/5 Hot-load it into the running server")
        hot_load(server)
        step("4/5 Evaluate base and adapter on held-out questions")
        evaluation = command(
            "eval", "--run", NAME, "--url", server.base_url, "--models", f"base,{NAME}", "--no-baselines",
            "--questions", "14", "--references", "2",
            *(word for name, value in SAMPLING.items() for word in (f"--{name}", value)),
        )  # fmt: skip
        step(f"5/5 Load-test both for {LOAD_S} s")
        load = command(
            "loadtest", "--run", NAME, "--url", server.base_url, "--models", f"{BASE},{NAME}",
            "--duration-s", str(LOAD_S), "--rate", "1.5", "--output-tokens", "48",
            accept=(0, 4),
        )  # fmt: skip
    print(f"\n{evaluation_finding(evaluation)}\n")
    print(text_table([*quality(evaluation), *speed(load)[1:]], 1))
    for reason in load["invalid"]:
        print(f"the load test is invalid: {reason}")
    report = RUN.path / "report.html"
    write_text(report, report_page(evaluation, load))
    print(f"\nThe demo took {time.monotonic() - started:.0f} s. Read the answers side by side in")
    print(report.resolve())
    print(f"Next: python -m serve --model {BASE}, and in another terminal python -m serve chat {NAME}")
    return 0


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def train() -> None:
    """Train, or resume training that was interrupted; a finished run is kept."""
    if RUN.complete:
        print(f"skipped: {RUN.path} is a finished run; remove it to train again")
        return
    command("train", NAME, *(["--resume"] if (RUN.path / "config.json").is_file() else []))


def hot_load(server: Server) -> None:
    """Wait until the running server lists the adapter, which training has just published."""
    client = make_client(server.base_url)
    started = time.monotonic()
    while NAME not in (served := [model.id for model in client.models.list()]):
        if time.monotonic() - started > LISTED_WITHIN_S:
            raise UserError(f"{NAME!r} is not served after {LISTED_WITHIN_S:.0f} s, only {served}; see {server.log}")
        time.sleep(0.2)
    print(f"no restart: /v1/models lists {', '.join(served)} ({time.monotonic() - started:.1f} s after training ended)")


def command(package: str, *words: str, accept: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run one of the project's commands and show its output; return the JSON document on its last line.

    `accept`: exit statuses that still leave a document, such as 4 of an invalid load test.
    """
    print(f"$ python -m {package} {' '.join(words)}", flush=True)
    argv = [sys.executable, "-m", package, *words]
    pending = ""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, encoding="utf-8", bufsize=1) as process:
        assert process.stdout is not None
        for line in process.stdout:
            # A line that may be the document is printed only when another line follows it.
            print(pending, end="", flush=True)
            pending = line if line.startswith("{") else ""
            if not pending:
                print(line, end="", flush=True)
    if process.returncode not in accept or not pending:
        raise UserError(f"python -m {package} ended with status {process.returncode}; its output is above")
    document: dict[str, Any] = json.loads(pending)
    return document


def quality(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table of held-out quality, with its head."""
    cells = [("", BASE, NAME)]
    for metric in ("bits_per_byte", "similarity_max", "similarity_mean"):
        values = (evaluation["arms"][arm]["metrics"].get(metric) for arm in (BASE, NAME))
        base, adapter = (with_interval(value, 3) or "-" for value in values)
        cells.append((label(metric), base, adapter))
    return cells


def speed(load: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table of latencies, with its head.

    Tokens per second by model are left out: they are the share of the requests that each model got.
    """
    cells = [("", BASE, NAME)]
    models = [load["models"].get(arm) for arm in (BASE, NAME)]
    for title, key in (("requests answered", "ok"), ("requests failed", "errors")):
        base, adapter = ("-" if figures is None else str(figures[key]) for figures in models)
        cells.append((title, base, adapter))
    for title, key, percentile in (
        ("time to first token, median ms", "ttft_s", "p50"),
        ("time to first token, p90 ms", "ttft_s", "p90"),
        ("time per output token, median ms", "tpot_s", "p50"),
    ):
        base, adapter = ("-" if figures is None else milliseconds(figures[key][percentile]) for figures in models)
        cells.append((title, base, adapter))
    return cells


def report_page(evaluation: dict[str, Any], load: dict[str, Any]) -> str:
    """The report: one HTML file that needs no other."""
    summary = RUN.summary()
    losses = chart(
        lambda axes: draw_losses(axes[0], read_jsonl(RUN.path / "metrics.jsonl"), "Loss while training"),
        title="Loss while training",
        description=f"Training and validation loss over {summary['steps']} steps. Validation loss before training: "
        f"{summary['val_loss_base']}; best: {summary['val_loss']}.",
        height=4.4,
        wide=True,
    )
    answered = sum((load["models"].get(arm) or {"ok": 0})["ok"] for arm in (BASE, NAME))
    sections = [
        section(
            "Quality",
            quality(evaluation),
            note=f"{evaluation['questions']} held-out questions; brackets hold 95 % intervals over questions. "
            "Similarity compares an answer with counselors' answers to the same question. The sample data set is "
            "small: this shows that every step works, not how good an adapter can be.",
        ),
        answer_columns(
            "Three held-out questions",
            examples(evaluation),
            note="Both models answered in the same way: "
            + ", ".join(f"{name} {value}" for name, value in SAMPLING.items())
            + ". A model this small writes sentences that make no sense and can give harmful advice. "
            "No clinician has rated its answers.",
        ),
        section(
            "Speed",
            speed(load),
            note=f"{LOAD_S} s of load on this machine, shared evenly between the two models: {answered} requests "
            "answered. With so few, p90 is close to the slowest request.",
        ),
        section(
            "Training",
            losses,
            note=f"{summary['steps']} steps in {summary['wall_s']:.0f} s, {summary['tokens_per_s']:.0f} tokens/s.",
        ),
    ]
    doubts = [f"The load test is invalid: {reason}." for reason in load["invalid"]]
    return page(
        f"Counsel Stack demo: {BASE} and {NAME}",
        sections,
        finding=evaluation_finding(evaluation),
        warnings=[*evaluation["warnings"], *doubts],
    )


def examples(evaluation: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The first three held-out questions with the answers of base and adapter."""
    questions = {row["question_id"]: row["question"] for row in RUN.split("test")}
    by_question: dict[str, dict[str, str]] = {}
    for row in read_jsonl(Path(evaluation["folder"]) / "samples.jsonl"):
        text = row["text"] + (" … (cut at the maximum length)" if row["finish_reason"] == "length" else "")
        by_question.setdefault(row["question_id"], {}).setdefault(row["arm"], text)
    return [
        (questions[key], [(arm, arms[arm]) for arm in (BASE, NAME)])
        for key, arms in sorted(by_question.items())
        if {BASE, NAME} <= arms.keys()
    ][:3]


if __name__ == "__main__":
    sys.exit(exit_status(main))
