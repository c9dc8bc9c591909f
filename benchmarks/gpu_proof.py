"""Does the stack work on this machine's GPU, and how fast? One command, one JSON file, one page: `make gpu-proof`.

    python -m benchmarks.gpu_proof                 on a machine with an NVIDIA GPU, within 8 minutes, without network
    python -m benchmarks.gpu_proof --tiny          the same steps on a CPU with tiny models: shows that the proof runs

Random weights of real shapes are made on the spot. Every step writes its row as it ends (benchmarks/steps.py), has its
own time limit, and is not repeated by the next call: a call that ran out of time, or was stopped, is given again.

set_up            the installed packages are those of the lock
models            the bases and adapters are made
answers           base and 8 adapters in one batch, in bfloat16, against PEFT (benchmarks/gpu_reference.py)
hot_load          an adapter published while the server runs: seconds to its first token, and right answers
churn             more adapters than the server keeps, one replaced, one removed: every answer still right
throughput        tokens/s of base and mixed adapters at each concurrency
first_token       seconds to the first token, by percentile
drain             the server is stopped while it answers: no answer is cut
bare_throughput   the same load on vLLM with its own defaults
train_ours, train_trl   tokens/s and peak memory of our trainer and of TRL's defaults
train_reference   six steps of the 4-bit reference recipe

Without a GPU, and without --tiny, it says "not run: no GPU", writes nothing, and ends with status 4: a proof that did
not run must not pass for one that did. Else the status is 0 if all steps ran and none missed what it is judged by, 3
if one missed it, and 1 if one failed or did not run.

Writes <out>/proof.json (processor, device, figures by step, ratios), <out>/proof.html, <out>/rows and <out>/logs;
<out>/work has models and runs, and may be removed. The figures of --tiny say nothing about speed.
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import gpu_page
from benchmarks.steps import DONE, Figures, Rows, Stage, Step, run_stage
from counsel.cli import CANNOT_BE_JUDGED, MISSED, Command, Result, main, option
from counsel.errors import UserError
from counsel.files import read_json, write_json, write_text
from counsel.processor import processor
from counsel.run import provenance
from counsel.values import PositiveFloat

LOCKS = Path(__file__).parent.parent / "locks"
# Together twice the time that the proof has: the limits are against what hangs. A server's start is in its set-up.
STAGES = (
    Stage("set_up", 30, (Step("set_up", 30), Step("models", 45))),
    Stage(
        "serving",
        150,
        (
            Step("answers", 45),
            Step("hot_load", 20),
            Step("churn", 45),
            Step("throughput", 60),
            Step("first_token", 20),
            Step("drain", 30),
        ),
    ),
    Stage("bare", 150, (Step("bare_throughput", 45),)),
    Stage("train_ours", 30, (Step("train_ours", 45),)),
    Stage("train_trl", 30, (Step("train_trl", 45),)),
    Stage("train_reference", 30, (Step("train_reference", 75),)),
)
# On a CPU, vLLM alone takes half a minute to start.
TINY_FACTOR = 20


@dataclass(frozen=True)
class GpuProof:
    """Where to write, and for how long to run."""

    tiny: bool = option(False, "tiny models, on a CPU too: shows that the proof itself runs")
    within_s: PositiveFloat = option(480.0, "stop after this long; the same command then goes on")
    out: str = option("runs/gpu-proof", "folder for rows, logs, JSON and page")
    stage: str = option("", "run one stage in this process (the proof itself uses this)")


def device_here() -> tuple[str, str]:
    """`cuda` or `cpu`, and the device's name."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name(0)
    return "cpu", str(processor())


def gpu_proof(config: GpuProof) -> Result:
    """Run every step that has no row yet; write the JSON and the page."""
    out = Path(config.out).absolute()
    device, name = device_here()
    if device != "cuda" and not config.tiny:
        print("not run: no GPU")
        return Result({"processor": str(processor()), "verdict": "not run: no GPU"}, CANNOT_BE_JUDGED)
    rows = Rows(out / "rows")
    if config.stage:
        run_one(config, out, rows, device)
        return Result({"stage": config.stage})
    made_by = provenance()
    _check_same(out, {"tiny": config.tiny, "device": name, "git": made_by["git"]})
    rows.forget_unfinished(STAGES)
    deadline_s = time.monotonic() + config.within_s
    for stage in limited(config.tiny):
        argv = [sys.executable, "-m", "benchmarks.gpu_proof", "--stage", stage.name, "--out", str(out)]
        argv += ["--tiny"] if config.tiny else []
        run_stage(stage, rows, argv, out / "logs" / f"{stage.name}.log", deadline_s)
        for step in stage.steps:
            print(gpu_page.line(rows.read(step.name) or {}), file=sys.stderr, flush=True)
    done = [row for stage in STAGES for step in stage.steps if (row := rows.read(step.name))]
    document = {"processor": str(processor()), "device": name, "tiny": config.tiny, "verdict": verdict(done)[0],
                "ratios": ratios(done), "steps": done, **made_by}  # fmt: skip
    write_json(out / "proof.json", document)
    write_text(out / "proof.html", gpu_page.proof_page(document))
    summary = {key: document[key] for key in ("processor", "device", "tiny", "verdict", "ratios")}
    return Result(summary | {"proof": str(out / "proof.json")}, verdict(done)[1], f"open {out / 'proof.html'}")


def limited(tiny: bool) -> list[Stage]:
    """The stages with their limits; those of --tiny, which runs on slow machines, are only against hanging."""
    factor = TINY_FACTOR if tiny else 1
    return [
        stage._replace(
            set_up_s=stage.set_up_s * factor,
            steps=tuple(step._replace(limit_s=step.limit_s * factor) for step in stage.steps),
        )
        for stage in STAGES
    ]


def verdict(rows: list[dict[str, Any]]) -> tuple[str, int]:
    """One sentence about all rows, and the exit status."""
    unfinished = [f"{row['step']} ({row['status']})" for row in rows if row["status"] != DONE]
    missed = [row["step"] for row in rows if row["figures"].get("ok") is False]
    if unfinished:
        return f"not whole: {', '.join(unfinished + [f'{step} (missed)' for step in missed])}", 1
    if missed:
        return f"missed: {', '.join(missed)}", MISSED
    return "every step ran, and what is judged is right", 0


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What was measured, compared: by load, then our trainer over TRL's. Each is of single measurements (n = 1)."""
    figures = {row["step"]: row["figures"] for row in rows if row["status"] == DONE}
    result = {}
    ours, bare = (figures.get(step, {}).get("tokens_s", {}) for step in ("throughput", "bare_throughput"))
    for cell, tokens_s in ours.items():
        concurrency = cell.rpartition("_c")[2]
        if not cell.startswith("base"):
            result[f"{cell}_vs_base"] = round(tokens_s / ours[f"base_c{concurrency}"], 3)
        if cell in bare:
            result[f"{cell}_vs_bare"] = round(tokens_s / bare[cell], 3)
    if "train_ours" in figures and "train_trl" in figures:
        mine, theirs = figures["train_ours"], figures["train_trl"]
        result["train_tokens_per_s_vs_trl"] = round(mine["tokens_per_s"] / theirs["tokens_per_s"], 3)
        result["train_peak_memory_vs_trl"] = round(mine["peak_memory_bytes"] / theirs["peak_memory_bytes"], 3)
    return result


def run_one(config: GpuProof, out: Path, rows: Rows, device: str) -> None:
    """The steps of one stage, in this process."""
    from benchmarks import gpu_models, gpu_serving, gpu_training

    work, tiny = out / "work", config.tiny
    work.mkdir(parents=True, exist_ok=True)
    load = gpu_serving.SMALL if tiny else gpu_serving.FULL

    def set_up() -> None:
        rows.run("set_up", lambda: against_lock((LOCKS / f"{device}.txt").read_text(encoding="utf-8")))
        rows.run("models", lambda: gpu_models.make_models(work, tiny))

    stages: dict[str, Callable[[], None]] = {
        "set_up": set_up,
        "serving": lambda: gpu_serving.serve_ours(work, rows, load, device),
        "bare": lambda: gpu_serving.serve_bare(work, rows, load, device),
        "train_ours": lambda: rows.run("train_ours", lambda: gpu_training.train_ours(work, tiny)),
        "train_trl": lambda: rows.run("train_trl", lambda: gpu_training.train_trl(work, tiny, device)),
        "train_reference": lambda: rows.run("train_reference", lambda: gpu_training.train_reference(work, device)),
    }
    if config.stage not in stages:
        raise UserError(f"stage is {config.stage!r}; allowed: {', '.join(stages)}")
    stages[config.stage]()


def against_lock(lock: str) -> Figures:
    """The installed packages against the pins of a lock; those whose marker does not hold here are left out."""
    from packaging.requirements import Requirement

    pins = [Requirement(line.removesuffix("\\").strip()) for line in lock.splitlines() if re.match(r"[\w.-]+==", line)]
    differ = {}
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    for pin in here:
        try:
            installed = metadata.version(pin.name)
        except metadata.PackageNotFoundError:
            installed = "absent"
        if installed == "absent" or not pin.specifier.contains(installed, prereleases=True):
            differ[pin.name] = f"{installed}, locked {str(pin.specifier).removeprefix('==')}"
    return {"ok": not differ, "locked": len(here), "differ": differ}


def _check_same(out: Path, spec: dict[str, Any]) -> None:
    """Raise UserError if the rows in `out` are of another machine, commit or size: they do not belong together."""
    path = out / "spec.json"
    if not path.is_file():
        write_json(path, spec)
        return
    before = read_json(path)
    for key, value in spec.items():
        if before.get(key) != value:
            raise UserError(
                f"{str(out)!r} has rows of another run: its {key} is {before.get(key)!r}, and here it is {value!r}; "
                "choose another --out, or remove that folder"
            )


if __name__ == "__main__":
    sys.exit(
        main("benchmarks.gpu_proof", {"": Command(GpuProof, gpu_proof, "prove and measure the stack on this GPU")})
    )
