"""What an evaluation costs, and whether its numbers are right: `make bench-eval`, with a server already running.

    python -m benchmarks.eval --run counselchat --url http://127.0.0.1:8000/v1 --adapter counselchat

minutes_100x2: elapsed time of `python -m eval`, from start to report, for 100 questions on base and adapter. If the run
holds out fewer questions, the time is scaled up. nll_vs_transformers_max_abs_diff: the largest difference in nats per
token, over 8 answers, between the server's likelihood and transformers' in float32 (with PEFT for the adapter). A
server in bfloat16 rounds: expect one to three hundredths. rows_lost_after_kill: rows that are missing, duplicated or
changed after an evaluation of 10 questions was killed with -9 halfway and started again. offline_vs_generate: tokens
per second of `python -m eval batch --base` over those of plain LLM.generate, the median over rounds with its range (see
benchmarks/offline.py); the server is idle during both.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.offline import offline_vs_generate
from counsel.catalog import resolve
from counsel.chat import prompt_messages
from counsel.files import read_json
from counsel.processor import processor
from counsel.run import open_run
from eval.likelihood import Renderer
from eval.questions import choose_questions
from eval.samples import LIKELIHOOD_KEY, SAMPLE_KEY, read_rows


def timed(words: list[str]) -> tuple[float, dict[str, Any]]:
    """Run one evaluation; return its seconds and the JSON document of its last line."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "eval", *words], stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])


def lost_after_kill(words: list[str], evaluations: Path) -> int:
    """Rows missing, duplicated or changed after kill -9 halfway and the same command again."""
    known = set(evaluations.glob("*"))
    killed = subprocess.Popen([sys.executable, "-m", "eval", *words], stdout=subprocess.PIPE)
    folder: Path | None = None
    rows: list[dict[str, Any]] = []
    while killed.poll() is None and len(rows) < 8:
        time.sleep(0.05)
        folder = next(iter(set(evaluations.glob("*")) - known), None)
        rows = read_rows(folder / "samples.jsonl") if folder else []
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert folder is not None
    files = {"samples.jsonl": SAMPLE_KEY, "likelihood.jsonl": LIKELIHOOD_KEY}
    before = {name: read_rows(folder / name) for name in files}
    _, document = timed(words)
    assert document["folder"] == str(folder), "the second evaluation did not continue the first"
    lost = 0
    for name, key in files.items():
        after = read_rows(folder / name)
        keys = [tuple(row[part] for part in key) for row in after]
        lost += len(keys) - len(set(keys)) + sum(row not in after for row in before[name])
    expected = 2 * document["questions"]
    return lost + abs(expected - len(read_rows(folder / "samples.jsonl")))


def worst_difference(folder: Path, adapter: str, answers: int = 4) -> float:
    """The largest |server - transformers| in nats per token, over `answers` answers of base and of adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, spec = open_run(str(folder.parent.parent)), read_json(folder / "config.json")
    base = resolve(run.config()["base"]).path
    renderer = Renderer(base)
    questions = {q.question_id: q for q in choose_questions(run, spec["config"]["questions"])}
    worst = 0.0
    for name in (spec["base"], adapter):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = (PeftModel.from_pretrained(model, run.adapter) if name == adapter else model).eval()
        scored = [r for r in read_rows(folder / "likelihood.jsonl") if r["arm"] == name and r["nll_nats"] is not None]
        for row in sorted(scored, key=lambda r: (r["question_id"], r["answer"]))[:answers]:
            question = questions[row["question_id"]]
            messages = prompt_messages(question.question, spec["system_prompt"])
            span = renderer.span(messages, question.answers[row["answer"]])
            assert span is not None
            with torch.inference_mode():
                logprobs = model(torch.tensor([span.ids])).logits[0].log_softmax(-1)
            nll = -sum(float(logprobs[at - 1, span.ids[at]]) for at in range(span.start, len(span.ids)))
            worst = max(worst, abs(nll - row["nll_nats"]) / row["tokens"])
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, help="run whose held-out questions are asked")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="a running server")
    parser.add_argument("--adapter", required=True, help="served name of the run's adapter")
    given = parser.parse_args()
    common = ["--run", given.run, "--url", given.url, "--models", f"base,{given.adapter}", "--no-baselines"]

    elapsed_s, document = timed([*common, "--questions", "100"])
    questions = document["questions"]
    lost = lost_after_kill([*common, "--questions", "10"], open_run(given.run).path / "eval")
    print(
        json.dumps(
            {
                "minutes_100x2": round(elapsed_s / 60 * 100 / questions, 2),
                "questions": questions,
                "minutes": round(elapsed_s / 60, 2),
                **offline_vs_generate(given.run),
                "nll_vs_transformers_max_abs_diff": round(worst_difference(Path(document["folder"]), given.adapter), 5),
                "rows_lost_after_kill": lost,
                "processor": str(processor()),
            }
        )
    )


if __name__ == "__main__":
    main()
