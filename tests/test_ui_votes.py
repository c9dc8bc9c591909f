"""Votes: what is kept of one, what is refused, and that no other word of a conversation reaches the disk."""

import json
import random
import re
import stat
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.api_errors import ApiError
from serve.name_table import NameTable
from serve.routes import UI_ROUTES, required_role
from serve.server_registry import ServerRecord
from serve.ui.votes import REASONS, VoteFile, parse_vote, vote_row
from tests.conftest import ORIGIN, Served

NAMES = NameTable("tiny", ServerRecord("", "f00d", 16))
PROMPT = [{"role": "user", "content": "mail me at ann@example.org, or call 988"}]
SINGLE = {"answers": [{"model": "tiny"}], "choice": "good", "blind": False, "consent": False}
PAIR = {
    "answers": [{"model": "tiny", "text": "one"}, {"model": "tiny", "text": "see www.example.org/x"}],
    "choice": "second", "blind": True, "consent": True, "prompt": PROMPT, "reasons": ["warmth"],
    "comment": "call 202-555-0100", "sampling": {"temperature": 0.7},
}  # fmt: skip


def row(**changes: object) -> dict[str, Any]:
    return vote_row(parse_vote({**PAIR, **changes}), NAMES, "ann")


def test_a_choice_between_two_is_a_preference_row():
    """The better answer is `chosen` whichever side it was on; personal contacts are masked, crisis numbers stay."""
    second, first = row(), row(choice="first")
    assert second["prompt"] == [{"role": "user", "content": "mail me at [e-mail address], or call 988"}]
    assert second["chosen"] == [{"role": "assistant", "content": "see [link]"}]
    assert second["rejected"] == [{"role": "assistant", "content": "one"}]
    assert (first["chosen"], first["rejected"]) == (second["rejected"], second["chosen"])
    assert second["comment"] == "call [phone number]"
    provenance = {key: second[key] for key in ("rater", "base", "models", "choice", "blind", "reasons", "sampling")}
    assert provenance == {
        "rater": "ann", "base": {"name": "tiny", "fingerprint": "f00d"}, "models": ["tiny", "tiny"],
        "choice": "second", "blind": True, "reasons": ["warmth"], "sampling": {"temperature": 0.7},
    }  # fmt: skip


@pytest.mark.parametrize(("choice", "label"), [("good", True), ("bad", False)])
def test_a_verdict_on_one_answer_is_an_unpaired_row(choice, label):
    """In the form that TRL's KTOTrainer reads."""
    kept = row(answers=[{"model": "tiny", "text": "hm"}], choice=choice)
    assert (kept["completion"], kept["label"]) == ([{"role": "assistant", "content": "hm"}], label)
    assert not {"chosen", "rejected"} & set(kept)


def test_the_rows_are_what_trl_reads(tmp_path):
    """datasets loads the file; TRL takes the preference rows as conversations."""
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    file = VoteFile(tmp_path)
    for kept in (row(), row(choice="first", reasons=[], comment=""), vote_row(parse_vote(SINGLE), NAMES, "ann")):
        file.add(kept)
    votes = load_dataset("json", data_files=str(file.path), split="train", cache_dir=str(tmp_path / "cache"))
    pairs = votes.filter(lambda vote: vote["chosen"] is not None)
    assert len(pairs) == 2
    assert all(is_conversational(pair) for pair in pairs.select_columns(["prompt", "chosen", "rejected"]))


def test_without_consent_no_text_may_be_sent_and_none_is_kept():
    """Nor with a tie, which trains nothing."""
    kept = vote_row(parse_vote(SINGLE), NAMES, "ann")
    assert not {"prompt", "chosen", "rejected", "completion", "comment"} & set(kept)
    tie = {**PAIR, "choice": "tie", "consent": False, "prompt": [], "comment": ""}
    tie["answers"] = [{"model": "tiny"}, {"model": "tiny"}]
    assert vote_row(parse_vote(tie), NAMES, "ann")["choice"] == "tie"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"consent": False}, "without consent, no prompt, text or comment"),
        ({"choice": "tie"}, "a tie is kept without text"),
        ({"choice": "good"}, "choice must be first, second or tie for two answers"),
        ({"choice": "best"}, "choice: Input should be 'first', 'second', 'tie', 'good' or 'bad'"),
        ({"prompt": []}, "with consent, prompt and the text of every answer are needed"),
        ({"answers": [{"model": "tiny", "text": "a"}, {"model": "tiny"}]}, "with consent, prompt and the text"),
        ({"answers": []}, "answers: List should have at least 1 item"),
        ({"answers": [PAIR["answers"][0]] * 3}, "answers: List should have at most 2 items"),
        ({"prompt": [*PROMPT, {"role": "assistant", "content": "x"}]}, "prompt must end with the person's turn"),
        ({"prompt": [{"role": "canary", "content": "x"}]}, "prompt.0.role: Input should be"),
        ({"reasons": ["canary"]}, "reasons.0: Input should be 'warmth'"),
        ({"sampling": {"temperature": "canary"}}, "sampling.temperature: Input should be a valid number"),
        ({"sampling": {"canary": 1}}, "Extra inputs are not permitted"),
        ({"canary": 1}, "the vote: Extra inputs are not permitted"),
        ({"blind": "yes"}, "blind: Input should be a valid boolean"),
        ({"comment": "x" * 2001}, "comment: String should have at most 2000 characters"),
        ({"comment": "\ud800"}, "comment: Input should be a valid string"),
        ({"answers": [{"model": "canary", "text": "a"}, PAIR["answers"][0]]}, "exact models that the replies named"),
    ],
)
def test_a_vote_that_does_not_hold_together_is_refused(fields, reason):
    """With what is wrong, and never with a value that was sent: errors are logged by proxies."""
    with pytest.raises(ApiError) as refused:
        row(**fields)
    assert refused.value.status == 400
    assert reason in refused.value.message
    assert "canary" not in refused.value.message


def test_votes_are_added_and_deleted_whole(tmp_path, monkeypatch):
    """For every order of deleting one, two or three; the file is for its owner alone; a torn last line is replaced."""
    for n in (1, 2, 3):
        file = VoteFile(tmp_path / str(n))
        kept = [row() for _ in range(n)]
        threads = [threading.Thread(target=file.add, args=(one,)) for one in kept]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
        left = {one["id"] for one in kept}
        for vote_id in random.Random(n).sample(sorted(left), n):
            file.delete(vote_id)
            left.remove(vote_id)
            assert {json.loads(line)["id"] for line in file.path.read_text().splitlines()} == left
            assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert file.path.read_bytes() == b""

    file.path.write_bytes(b'{"id": "whole"}\n{"id": "to')
    file.add(row())
    assert [len(json.loads(line)) > 1 for line in file.path.read_text().splitlines()] == [False, True]
    with pytest.raises(ApiError, match="there is no vote"):
        file.delete("0" * 32)
    monkeypatch.setattr("serve.ui.votes.MAX_BYTES", file.path.stat().st_size)
    with pytest.raises(ApiError, match="move it away"):
        file.add(row())


@pytest.mark.parametrize(("method", "path"), [*UI_ROUTES, ("DELETE", "/v1/votes/" + "0" * 32)])
def test_a_server_without_the_page_has_none_of_its_routes(method, path):
    """The page and the votes exist with --ui only, and what they need is as on the API."""
    role = required_role(method, path, preflight=False, open_server=False, ui=True)
    assert role == ("user" if path.startswith("/v1/") else "anyone")
    with pytest.raises(ApiError) as refused:
        required_role(method, path, preflight=False, open_server=False, ui=False)
    assert refused.value.status == 404


def vote(server: Served, body: dict[str, Any], **headers: str) -> httpx.Response:
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {server.user_key}", **headers}
    return httpx.post(server.base_url + "/votes", content=json.dumps(body), headers=given, timeout=60)


def test_the_server_takes_and_deletes_votes_of_key_holders(server):
    """A vote needs a key and JSON; its id deletes it, once."""
    model = server.client().models.retrieve("gentle").model_dump()["root"]
    body = {**SINGLE, "answers": [{"model": model}]}
    assert vote(server, body, Authorization="").status_code == 401
    # A browser sends this type for another site's page without asking first.
    assert vote(server, body, **{"Content-Type": "text/plain"}).status_code == 400
    assert vote(server, {**SINGLE, "answers": [{"model": "gentle"}]}).status_code == 400
    reply = vote(server, body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["models"] == [model]
    path = f"/v1/votes/{reply.json()['id']}"
    assert server.call("DELETE", path).status_code == 401
    assert server.call("DELETE", path, server.user_key).json()["deleted"] is True
    assert server.call("DELETE", path, server.user_key).status_code == 404
    assert server.call("DELETE", "/v1/votes/canary", server.user_key).status_code == 404


def test_after_a_session_only_agreed_text_is_on_disk(server, request):
    """Random conversations and votes, good and broken: each word is a canary, and the whole disk of the server is read.

    The words that a person agreed to are in votes.jsonl and nowhere else, and leave with the vote.
    """
    draw = random.Random(7)
    words = (f"canary{n:04d}x" for n in range(10_000))
    agreed: dict[str, set[str]] = {}
    refused_words: set[str] = set()
    client = server.client()
    for number in range(24):
        prompt = []
        for i in range(draw.choice((1, 3))):
            prompt.append({"role": ("user", "assistant")[i % 2], "content": f"{next(words)} {next(words)}"})
        if draw.random() < 0.5:
            prompt.insert(0, {"role": "system", "content": next(words)})
        reply = client.chat.completions.create(
            model=draw.choice(("gentle", "calm", "tiny")), messages=prompt, max_tokens=2
        )
        n = draw.choice((1, 2))
        consent = draw.random() < 0.5
        texts = [next(words) for _ in range(n)]
        body: dict[str, Any] = {
            "answers": [{"model": reply.model, **({"text": text} if consent else {})} for text in texts],
            "choice": draw.choice(("first", "second") if n == 2 else ("good", "bad")),
            "reasons": draw.sample(REASONS, draw.randrange(3)), "blind": draw.random() < 0.5, "consent": consent,
        }  # fmt: skip
        if consent:
            body |= {"prompt": prompt, "comment": next(words)}
        said = set(re.findall("canary[0-9]{4}x", json.dumps([prompt, texts, body.get("comment")])))
        if number % 4 == 3:
            # A request that is refused: text without consent, a role or field that does not exist, not JSON.
            broken = draw.choice(
                ({"consent": False, "comment": next(words)}, {next(words): 1}, {"choice": next(words)})
            )
            response = vote(server, {**body, **broken})
            assert response.status_code == 400, response.text
            refused_words |= said
            continue
        response = vote(server, body)
        assert response.status_code == 200, response.text
        if consent:
            agreed[response.json()["id"]] = said
        else:
            refused_words |= said
    assert agreed
    assert refused_words
    folder = Path(server.server.config.votes).parent
    votes = Path(server.server.config.votes) / "votes.jsonl"

    def places(word: str) -> list[Path]:
        return [path for path, content in on_disk.items() if word.encode() in content]

    on_disk = {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"
    }
    assert votes in on_disk
    assert server.logs / "server.log" in on_disk
    for said in agreed.values():
        assert all(places(word) == [votes] for word in said)
    assert [word for word in refused_words if places(word)] == []
    for vote_id in agreed:
        assert server.call("DELETE", f"/v1/votes/{vote_id}", server.user_key).status_code == 200
    on_disk = {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"
    }
    assert places("canary0") == []


def test_the_page_comes_with_a_policy_that_allows_this_server_alone(server):
    """Anyone may load the page, from no other site's frame; every file has its type, and no browser may guess."""
    for method, path in UI_ROUTES:
        if method != "GET":
            continue
        reply = httpx.get(server.base_url.removesuffix("/v1") + path, headers={"Origin": ORIGIN})
        assert reply.status_code == 200
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "http" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert "AI" in httpx.get(server.base_url.removesuffix("/v1") + "/ui/").text
