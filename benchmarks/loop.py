"""The loop from votes to a promoted version, with scripted people: `make loop`.

    python -m benchmarks.loop                          a tiny random model: one planted run, 20 with drawn votes
    python -m benchmarks.loop --model smollm2-135m --repeats 0     the planted run on a real model

Each run starts from the same version of the adapter `gentle`, on one running server:

1. votes: for each question the server draws two answers, and a voter chooses through `/v1/votes`. The planted voter
   always takes the shorter one, the drawn voter tosses a coin.
2. `train dpo` trains the adapter further on these votes.
3. gate: of held-out votes, the lower bound of the share that the new version tells apart as the voter did is above one
   half. If not, the run ends here.
4. `serve publish --canary 0.5`, conversations with both versions, and `serve canary watch`, which promotes it or not.

The last line is JSON: whether the planted run was promoted, with its held-out accuracy, and how many of the runs with
drawn votes were (`false_promotions` of `drawn`, with the exact 95 % interval). The gate's interval lets one in 40 pass.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from counsel import rollout
from counsel import store as adapter_store
from counsel.catalog import Base, resolve
from counsel.cli import CANNOT_BE_JUDGED, MISSED, Command, Result, main, option
from counsel.client import make_client
from counsel.errors import UserError
from counsel.files import read_jsonl, write_jsonl
from counsel.processor import processor
from counsel.values import NonNegativeInt, PositiveInt, Seed
from serve.config import ServeConfig
from serve.server import Server
from tests.conftest import tiny_config
from tests.tiny import tiny_adapter, tiny_base

NAME = "gentle"
TINY = "tiny"
_ASKED_AT_ONCE = 16
_SUBJECTS = (
    "work", "school", "family", "sleep", "money", "friends", "moving", "exams", "winter", "noise", "travel", "cooking",
)  # fmt: skip
_FEELINGS = ("lonely", "tired", "nervous", "stuck", "bored", "proud", "lost", "angry", "hopeful", "restless")


@dataclass(frozen=True)
class Loop:
    """Which model, and how much of everything."""

    model: str = option(TINY, "base model: `tiny`, a random one, or one from the catalog")
    repeats: NonNegativeInt = option(20, "runs with drawn votes")
    votes: PositiveInt = option(120, "votes of a run")
    tokens: PositiveInt = option(24, "longest answer")
    units: PositiveInt = option(40, "conversations of each side at the canary's last look")
    epochs: PositiveInt = option(3, "of train dpo")
    learning_rate: float = option(5e-3, "of train dpo")
    seed: Seed = option(0, "seed of questions, answers and voters")


def run_loop(config: Loop) -> Result:
    """Run the loop once with the planted voter, and `repeats` times with one who draws."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        base = resolve(str(tiny_base(folder / "base", "llama")) if config.model == TINY else config.model)
        with Server(_server_config(config, folder, base), quiet=True) as server:
            adapter = tiny_adapter(base.path, folder / "adapter", seed=1)
            start = adapter_store.publish(folder / "store", NAME, adapter, base)
            _until_served(server, start)
            planted = _one_run(config, server, folder, base, "planted", config.seed)
            drawn = [_one_run(config, server, folder, base, "drawn", config.seed + n) for n in range(config.repeats)]
    false = sum(run["promoted"] for run in drawn)
    document = {
        "processor": str(processor()),
        "planted": planted,
        "drawn": len(drawn),
        "false_promotions": false,
        "interval95": _exact(false, drawn),
    }
    return Result(document, 0 if planted["promoted"] else MISSED)


def _server_config(config: Loop, folder: Path, base: Base) -> ServeConfig:
    if config.model == TINY:
        return tiny_config(folder, base.path, ui=True, votes=str(folder / "votes"))
    return ServeConfig(
        model=config.model, store=str(folder / "store"), logs=str(folder / "logs"), port=0, safety="off", ui=True,
        votes=str(folder / "votes"),
    )  # fmt: skip


def _one_run(config: Loop, server: Server, folder: Path, base: Base, voter: str, seed: int) -> dict[str, Any]:
    store = folder / "store"
    before = adapter_store.find(store, NAME)
    votes = folder / f"{voter}-{seed}.jsonl"
    write_jsonl(votes, _votes(config, server, folder, before.id, voter, seed))
    name = f"{voter}-{seed}"
    source = adapter_store.version_dir(store, before)
    _command(
        "train", "dpo", "--base", str(base.path), "--from", str(source), "--data", str(votes), "--name", name,
        "--runs", str(folder / "runs"), "--store", "", "--learning-rate", str(config.learning_rate),
        "--epochs", str(config.epochs), "--batch-size", "8", "--held-out-share", "0.4", "--samples", "0",
        "--max-length", "256", "--seed", str(seed),
    )  # fmt: skip
    run = folder / "runs" / name
    held_out = json.loads((run / "preferences.json").read_text())["held_out"]
    found = {"accuracy": held_out["accuracy"], "low": held_out["low"], "n": held_out["n"], "promoted": False}
    if held_out["low"] <= 0.5:
        _say(f"{name}: held-out accuracy {held_out['accuracy']:.2f}, at least {held_out['low']:.2f}: the gate ends it")
        return found
    _command("serve", "publish", str(run), "--name", NAME, "--system", "", "--canary", "0.5", "--store", str(store))
    sides = rollout.canary_sides(store, NAME)
    _until_served(server, sides.new, canary=True)
    _converse(config, server, seed)
    status, decided = _watch(config, folder)
    found["promoted"] = status == 0
    _say(f"{name}: held-out accuracy at least {held_out['low']:.2f}, canary: {decided['decision']}")
    if status == 0:
        # The next run starts where this one did.
        adapter_store.rollback(store, NAME)
    elif status == CANNOT_BE_JUDGED:
        rollout.end_canary(store, NAME)
    _until_served(server, before)
    return found


def _votes(config: Loop, server: Server, folder: Path, model: str, voter: str, seed: int) -> Iterator[dict[str, Any]]:
    """Let a voter choose between two answers to each question; the rows that the server kept."""
    draw = random.Random(seed)
    questions = _questions(draw, config.votes)
    client = make_client(server.base_url)

    def answer(of: tuple[str, int, int]) -> str:
        question, n_tokens, number = of
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=n_tokens, temperature=1.0,
            seed=number,
        )  # fmt: skip
        return reply.choices[0].message.content or ""

    # A random model never ends an answer, so the lengths of its answers are drawn.
    asked = [(q, draw.randint(4, config.tokens), 2 * n + side) for n, q in enumerate(questions) for side in (0, 1)]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        answers = list(pool.map(answer, asked))
    known = {row["id"] for row in _kept(folder)}
    for question, first, second in zip(questions, answers[::2], answers[1::2], strict=True):
        if not first or not second or first == second:
            continue
        shorter = "first" if len(first) < len(second) else "second"
        vote = {
            "answers": [{"model": model, "text": first}, {"model": model, "text": second}],
            "choice": shorter if voter == "planted" else draw.choice(("first", "second")),
            "blind": True, "consent": True, "prompt": [{"role": "user", "content": question}],
        }  # fmt: skip
        httpx.post(f"{server.base_url}/votes", json=vote, timeout=60).raise_for_status()
    return (row for row in _kept(folder) if row["id"] not in known)


def _kept(folder: Path) -> list[dict[str, Any]]:
    path = folder / "votes" / "votes.jsonl"
    return read_jsonl(path) if path.exists() else []


def _questions(draw: random.Random, n: int) -> list[str]:
    return [f"since day {number} i feel {draw.choice(_FEELINGS)} about {draw.choice(_SUBJECTS)}" for number in range(n)]


def _converse(config: Loop, server: Server, seed: int) -> None:
    """Stream conversations with the name: about half more than the canary's last look needs."""
    client = make_client(server.base_url)

    def talk(question: str) -> None:
        stream = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": question}], max_tokens=config.tokens, stream=True
        )
        for _ in stream:
            pass

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        list(pool.map(talk, _questions(random.Random(seed + 1000), 3 * config.units)))


def _watch(config: Loop, folder: Path) -> tuple[int, dict[str, Any]]:
    """Wide margins: a small server's times vary, and the version's worth was the gate's question."""
    done = _run(
        "serve", "canary", "watch", NAME, "--store", str(folder / "store"), "--logs", str(folder / "logs"), "--units",
        str(config.units), "--looks", "2", "--failed", "0.3", "--ttft", "1", "--time-per-token", "1",
    )  # fmt: skip
    if done.returncode not in (0, MISSED, CANNOT_BE_JUDGED):
        raise UserError(f"serve canary watch failed: {done.stderr.strip().splitlines()[-1]}")
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def _until_served(server: Server, manifest: adapter_store.Manifest, *, canary: bool = False) -> None:
    """Wait until the running server has a version: as what the name means, or as its canary."""
    while True:
        cards = httpx.get(f"{server.base_url}/models", timeout=60).json()["data"]
        card: dict[str, Any] = next((card for card in cards if card["id"] == NAME), {})
        if canary and (card.get("canary") or {}).get("version") == manifest.version:
            return
        if not canary and card.get("version") == manifest.version and not card.get("canary"):
            return
        time.sleep(0.1)


def _command(*words: str) -> dict[str, Any]:
    done = _run(*words)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{' '.join(words[:2])} failed: {reason}")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)


def _exact(hits: int, runs: list[dict[str, Any]]) -> list[float]:
    """Clopper and Pearson's interval."""
    from scipy.stats import binomtest

    if not runs:
        return [0.0, 1.0]
    interval = binomtest(hits, len(runs)).proportion_ci(0.95, "exact")
    return [round(interval.low, 3), round(interval.high, 3)]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main("benchmarks.loop", {"": Command(Loop, run_loop, "from votes to a promoted version, and back")}))
