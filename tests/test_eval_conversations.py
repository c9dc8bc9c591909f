"""The likelihood of held-out conversations, turn by turn: against transformers, and by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from counsel.cli import main
from counsel.files import read_json, read_jsonl, write_json, write_jsonl
from eval.__main__ import COMMANDS
from eval.conversations import turn_findings
from eval.samples import read_rows
from tests.conftest import SYSTEM, Served

OWN_SYSTEM = "you listen"
TALKS = (
    ("work is hard", "i am sorry", "what can help me", "talk to a friend", "thank you", "you are not alone"),
    ("i feel lonely", "since when", "since we moved", "breathe slowly"),
    ("sleep is hard", "listen to me"),
)


def spoken(talk: tuple[str, ...], system: str = "") -> list[dict[str, str]]:
    """The messages of a conversation, with a system message of its own if there is one."""
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(talk)]
    return [{"role": "system", "content": system}, *turns] if system else turns


@pytest.fixture(scope="module")
def evaluated(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of three conversations (3, 2 and 1 replies; the last has its own system message) and a question."""
    run = tmp_path_factory.mktemp("runs") / "talks"
    rows: list[dict[str, Any]] = [
        {
            "question_id": f"{at:016x}",
            "question": talk[0],
            "answer": talk[1],
            "topic": "",
            "messages": spoken(talk, OWN_SYSTEM if len(talk) == 2 else ""),
        }
        for at, talk in enumerate(TALKS)
    ]
    rows.append({"question_id": "f", "question": "help me", "answer": "talk to me", "topic": ""})
    write_jsonl(run / "data" / "test.jsonl", rows)
    write_jsonl(run / "data" / "train.jsonl", [{**rows[-1], "question_id": "t", "question": "moved"}])
    write_json(run / "config.json", {"base": str(server.base.path), "system": SYSTEM})
    write_json(run / "train.json", {})
    words = ("--run", str(run), "--url", server.base_url, "--models", "base,gentle", "--no-baselines",
             "--max-tokens", "8")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNSEL_API_KEY", server.user_key)
        assert main("eval", COMMANDS, words) == 0
    (folder,) = (run / "eval").iterdir()
    return folder


@pytest.mark.parametrize("arm", ["base", "gentle"])
def test_every_reply_is_scored_after_what_was_really_said(evaluated: Path, server: Served, arm: str) -> None:
    """One pass of transformers over each whole conversation gives the same nats for all its replies."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(server.base.path)
    model = AutoModelForCausalLM.from_pretrained(server.base.path, dtype=torch.float32, attn_implementation="eager")
    if arm != "base":
        model = PeftModel.from_pretrained(model, server.adapters[arm])
    name = read_json(evaluated / "config.json")["base"] if arm == "base" else arm
    found = {
        (int(row["question_id"], 16), row["turn"]): row["nll_nats"]
        for row in read_rows(evaluated / "turns.jsonl")
        if row["arm"] == name
    }
    expected = {}
    for number, talk in enumerate(TALKS):
        messages = spoken(talk, OWN_SYSTEM if len(talk) == 2 else SYSTEM)
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        with torch.inference_mode():
            logprobs = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
        for turn in range(1, len(talk) // 2 + 1):
            before = tokenizer.apply_chat_template(messages[: 2 * turn], add_generation_prompt=True, return_dict=False)
            end = ids.index(tokenizer.convert_tokens_to_ids("<end_of_turn>"), len(before))
            expected[number, turn] = -sum(float(logprobs[at - 1, ids[at]]) for at in range(len(before), end))

    assert found == pytest.approx(expected, rel=2e-4)


def test_the_summary_and_reports_have_the_turns(evaluated: Path) -> None:
    """Bits per byte of a turn are its bits over its bytes, over the conversations that reach it."""
    summary, rows = read_json(evaluated / "summary.json"), read_jsonl(evaluated / "turns.jsonl")
    gentle = [row for row in rows if row["arm"] == "gentle"]
    cells = summary["turns"]["arms"]["gentle"]

    assert summary["turns"]["conversations"] == 3
    assert {turn: cell["n"] for turn, cell in cells.items()} == {"all": 3, "1": 3, "2": 2, "3": 1}
    for turn in ("1", "2", "3", "all"):
        mine = [row for row in gentle if turn in ("all", str(row["turn"]))]
        bits = sum(row["nll_nats"] for row in mine) / math.log(2)
        assert cells[turn]["value"] == pytest.approx(bits / sum(row["bytes"] for row in mine))
    assert [(row["turn"], row["n"]) for row in summary["turns"]["differences"]] == [
        ("all", 3), ("1", 3), ("2", 2), ("3", 1)
    ]  # fmt: skip
    for report in ("report.md", "report.html"):
        assert "Conversations by turn" in (evaluated / report).read_text(encoding="utf-8")


def reply(arm: str, conversation: int, turn: int, nats: float | None) -> dict[str, Any]:
    return {"arm": arm, "question_id": f"{conversation}", "answer": 0, "turn": turn, "nll_nats": nats, "tokens": 1,
            "bytes": 2, "attempts": 1, "error": None if nats is not None else "too long"}  # fmt: skip


def test_differences_by_turn_are_over_the_replies_that_both_arms_have() -> None:
    """A reply that one arm lacks counts for neither; wins are conversations with fewer bits."""
    log2 = math.log(2)
    rows = [reply("base", talk, turn, 4 * log2) for talk in range(3) for turn in (1, 2)]
    rows += [reply("gentle", talk, turn, 2 * log2 * (1 + turn)) for talk in range(3) for turn in (1, 2)]
    rows[-1] = reply("gentle", 2, 2, None)
    found = {row["turn"]: row for row in turn_findings(rows, ["base", "gentle"], "base", 0)["differences"]}

    assert {turn: (row["value"], row["n"], row["wins"], row["losses"]) for turn, row in found.items()} == {
        "all": (pytest.approx(0.4), 3, 0, 2), "1": (pytest.approx(0), 3, 0, 0), "2": (pytest.approx(1), 2, 0, 2)
    }  # fmt: skip


def test_single_questions_have_no_turns(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without conversations an evaluation leaves no file and no key of this."""
    rows = [
        {"question_id": f"{at}", "question": talk[0], "answer": talk[1], "topic": ""} for at, talk in enumerate(TALKS)
    ]
    for name in ("test", "train"):
        write_jsonl(tmp_path / "run" / "data" / f"{name}.jsonl", rows)
    write_json(tmp_path / "run" / "config.json", {"base": str(server.base.path), "system": SYSTEM})
    write_json(tmp_path / "run" / "train.json", {})
    monkeypatch.setenv("COUNSEL_API_KEY", server.user_key)
    main("eval", COMMANDS, ("--run", str(tmp_path / "run"), "--url", server.base_url, "--models", "base",
                            "--no-baselines", "--max-tokens", "4"))  # fmt: skip
    (folder,) = (tmp_path / "run" / "eval").iterdir()

    assert not (folder / "turns.jsonl").exists()
    assert "turns" not in read_json(folder / "summary.json")
    assert "replies" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
