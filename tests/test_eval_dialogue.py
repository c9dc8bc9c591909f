"""Dialogues with scripted people: the script, the measures by hand, the statistics on drawn numbers, and the command
over real HTTP against a server whose models behave as their names say."""

import json
import random
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counsel.cli import main
from counsel.files import read_json, read_jsonl, write_json, write_jsonl
from eval.__main__ import COMMANDS
from eval.dialogue.features import FEATURES
from eval.dialogue.findings import compare_turns, significant
from eval.dialogue.measures import TURN_METRICS, repetition
from eval.dialogue.person import OPENING, RECALL, RECALL_TURN, TURNS, paths, personas, remembers
from tests.json_handler import JsonHandler

SENTENCE = "and you could also take a little time each day to see how it goes with them when the week is over"


class Scripted(JsonHandler):
    """Models by name: `steady` (the base) and `twin` draw 15 to 25 words and recall the fact. `fades` does so until
    turn 4; then it repeats its first answer twice, and recalls nothing. `refuses` answers 400 at turn 3 while
    `refusing`. `person` says which turn it plays."""

    seen: list[tuple[str, int | None, int]]
    refusing: bool

    def do_GET(self) -> None:
        adapters = [{"id": name, "parent": "steady", "root": name} for name in ("twin", "fades", "refuses")]
        cards = [{"id": "steady", "root": "steady"}, *adapters, {"id": "person", "root": "person"}]
        self.reply(200 if self.path == "/v1/models" else 404, {"data": cards})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = [message["content"] for message in body["messages"] if message["role"] != "system"]
        model, turn = body["model"], len(said) // 2 + 1
        self.seen.append((model, body.get("seed"), turn))
        if model == "refuses" and turn == 3 and self.refusing:
            self.reply(400, {"error": {"message": "as asked"}})
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text(model, said, body["seed"])},
                  "finish_reason": "stop"}  # fmt: skip
        self.reply(200, {"id": "x", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]})

    def text(self, model: str, said: list[str], seed: int) -> str:
        turn = len(said) // 2 + 1
        if model == "person":
            return f"I play turn {said[0].count('Person:') + 1}."
        if model == "fades" and turn > 4:
            return f"{said[1]} {said[1]}"
        draw = random.Random(f"{model if model == 'twin' else ''} {seed} {said[0]} {turn}")
        spoken = " ".join(draw.choices(SENTENCE.split(), k=draw.randint(15, 25)))
        fact = next(fact for persona in personas() for fact in persona.facts if remembers(said[0], fact))
        return f"{spoken} {fact}." if turn == RECALL_TURN else f"{spoken}."


@pytest.fixture
def stand_in() -> Iterator[tuple[str, type[Scripted]]]:
    """The server's URL and its handler."""
    handler = type("Handler", (Scripted,), {"seen": [], "refusing": True})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", handler
        server.shutdown()
        thread.join()


def talked(folder: Path, url: str, *words: str) -> tuple[int, Path]:
    """Run the command on a run in `folder`: its exit status, and where the dialogues are."""
    write_json(folder / "config.json", {"base": "steady", "system": "listen"})
    write_json(folder / "train.json", {})
    status = main("eval", COMMANDS, ("dialogue", "--run", str(folder), "--url", url, *words))
    return status, sorted((folder / "dialogue").iterdir())[-1]


def test_decay_after_turn_four_is_found_at_turn_five(stand_in: tuple[str, type[Scripted]], tmp_path: Path) -> None:
    """A planted arm differs first at turn 5, in length and repetition, and forgets; a twin differs nowhere."""
    url, handler = stand_in
    status, folder = talked(tmp_path / "run", url, "--models", "base,twin,fades", "--dialogues", "16")
    summary = read_json(folder / "summary.json")
    found = {(row["arm"], row["metric"], row["turn"]) for row in summary["differences"] if significant(row)}

    assert status == 0
    assert summary["onset"] == {"twin": None, "fades": 5}
    assert {("fades", metric, 5) for metric in ("words", "repetition")} <= found
    assert ("fades", "recall", RECALL_TURN) in found
    assert {row["metric"] for row in summary["drifts"] if significant(row)} >= {"words", "repetition"}
    assert "fades differs significantly from steady first at turn 5" in (folder / "report.md").read_text()
    html = (folder / "report.html").read_text()
    assert all(row["turns"][4]["text"] in html for row in read_jsonl(folder / "dialogues.jsonl"))
    # Every arm is asked with the same seeds, in the same turns.
    asked = {name: sorted((seed, turn) for model, seed, turn in handler.seen if model == name)
             for name in ("steady", "twin", "fades")}  # fmt: skip
    assert asked["steady"] == asked["twin"] == asked["fades"]
    assert len(asked["steady"]) == 16 * TURNS


def test_interrupted_and_failed_dialogues_are_had_again(stand_in: tuple[str, type[Scripted]], tmp_path: Path) -> None:
    """Finished dialogues stay as they are; failed ones are counted, then asked for again."""
    url, handler = stand_in
    words = ("--models", "base,refuses", "--dialogues", "4", "--concurrency", "1")
    status, folder = talked(tmp_path / "run", url, *words)
    summary, before = read_json(folder / "summary.json"), read_jsonl(folder / "dialogues.jsonl")

    assert status == 1
    assert (summary["arms"]["steady"]["errors"], summary["arms"]["refuses"]["errors"]) == (0, 4)
    assert all(row["error"].startswith("turn 3: ") and len(row["turns"]) == 3 for row in before[4:])
    assert summary["differences"] == []

    # As if it had been killed after three dialogues.
    (folder / "summary.json").unlink()
    write_jsonl(folder / "dialogues.jsonl", before[:3])
    handler.seen.clear()
    handler.refusing = False
    again, same = talked(tmp_path / "run", url, *words)

    assert (again, same) == (0, folder)
    assert read_jsonl(folder / "dialogues.jsonl")[:3] == before[:3]
    assert len(handler.seen) == 5 * TURNS
    assert read_json(folder / "summary.json")["onset"] == {"refuses": None}


def test_a_model_plays_the_person(stand_in: tuple[str, type[Scripted]], tmp_path: Path) -> None:
    """It says all but the opening and the question for the fact; a model that is not served is one line."""
    url, _ = stand_in
    words = ("--models", "base", "--dialogues", "2", "--person-url", url, "--person-model")
    _, folder = talked(tmp_path / "run", url, *words, "person")
    for row in read_jsonl(folder / "dialogues.jsonl"):
        persona = next(person for person in personas() if person.id == row["persona"])
        said = [turn["person"] for turn in row["turns"]]
        assert said[0] == persona.line(OPENING, row["dialogue"])
        assert said[RECALL_TURN - 1] == persona.line(RECALL, row["dialogue"])
        assert [said[at - 1] for at in (2, 3, 4, 5, 6, 8)] == [f"I play turn {at}." for at in (2, 3, 4, 5, 6, 8)]

    assert talked(tmp_path / "run", url, *words, "nobody")[0] == 1


def test_every_way_through_every_script_has_eight_different_lines() -> None:
    """Each persona has branches, says the fact only in turn 1, asks for it in turn 7, and never repeats itself."""
    assert 6 <= len(personas()) <= 10
    for persona in personas():
        ways = list(paths(persona))
        assert len(ways) > 4
        assert {state for way in ways for state in way} == set(persona.states)
        for way in ways:
            lines = [persona.line(state, 1) for state in way]
            assert len(set(lines)) == TURNS
            assert [remembers(line, persona.facts[1]) for line in lines] == [True] + [False] * (TURNS - 1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("What happened then?", {"question", "short"}),
        ('She asked "why?" and you left, and then the whole long day went by for you.', {"question"}),
        ("That sounds lonely.", {"feeling", "short"}),
        ("1. Call a friend who lives near you now.\n2) Walk to the river and back again.", {"list"}),
        ("- only one", {"short"}),
        ("", {"short"}),
        ("See a.example/?q=1 for more on the many ways that people have tried this before.", set()),
    ],
)  # fmt: skip
def test_what_an_answer_shows(text: str, shown: set[str]) -> None:
    assert {name for name, holds in FEATURES.items() if holds(text)} == shown


def test_repetition_is_of_earlier_answers_in_runs_of_five_words() -> None:
    """Six words have two runs; one of them was said before. Four words have none."""
    answers = ["one two three four five", "One, two three four five six", "a b c d", "a b c d one two three four five"]

    assert repetition(answers) == [0.0, 0.5, None, pytest.approx(1 / 5)]
    assert repetition([]) == []


def drawn(rng: np.random.Generator, shared: np.ndarray) -> dict[str, dict[int, dict[Any, float]]]:
    """One arm's values by metric, turn and dialogue: what both arms share by dialogue, and noise of its own."""
    table: dict[str, dict[int, dict[Any, float]]] = {}
    for metric in TURN_METRICS:
        table[metric] = {}
        for turn in range(1, TURNS + 1):
            values = shared + rng.normal(size=len(shared))
            table[metric][turn] = dict(enumerate((values > 0).astype(float) if metric == "recall" else values))
    return table


def test_identical_arms_differ_in_at_most_one_of_twenty_evaluations() -> None:
    """Over 200 evaluations of 12 dialogues the share with any finding is at most 5 %, plus three standard errors.

    A single turn before correction is "significant" in about 5 %: the test is neither blind nor too quick.
    """
    found = {"differences": 0, "drifts": 0}
    single = []
    for repeat in range(200):
        rng = np.random.default_rng(repeat)
        shared = rng.normal(size=12)
        result = compare_turns({"base": drawn(rng, shared), "twin": drawn(rng, shared)}, "base", seed=0)
        for family in found:
            found[family] += any(map(significant, result[family]))
        single += [row["p"] < 0.05 for row in result["differences"] if row["metric"] == "words"]

    assert max(found.values()) / 200 <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5
    # 1,600 tests: three standard errors are 1.6 %.
    assert np.mean(single) == pytest.approx(0.05, abs=0.017)
