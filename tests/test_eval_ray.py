"""Requests answered by engines in Ray actors: deaths of an actor, of all of them, of the driver; PEFT's tokens."""

import contextlib
import importlib.util
import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from counsel import store as adapter_store
from counsel.catalog import Base
from counsel.errors import UserError
from counsel.files import write_jsonl, write_text
from eval.batch import batch
from eval.config import BatchConfig
from eval.ray_engines import NO_ENGINE, RESTARTS, EngineActor, RayRequest, answers_on_ray
from eval.samples import read_rows
from serve.config import ServeConfig
from serve.offline import OfflineAnswer
from tests.conftest import SYSTEM
from tests.greedy import greedy_answers
from tests.held import kill_when_stopped
from tests.test_eval import command
from tests.test_eval_batch import ENGINE, GREEDY, N_TOKENS, TOPICS, asked, request
from tests.tiny import tiny_adapter
from tests.waiting import HANG_S, is_alive, until

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra `ray`)")


class Waiting:
    """In place of an engine: answers with the request, and keeps a list of what each process was asked.

    A request `die` ends the process, and `end` the engine, as many times. `refuse` in the folder: it does not start.
    """

    def __init__(self, config: ServeConfig, log: Path) -> None:
        self.folder = Path(config.store)

    async def __aenter__(self) -> "Waiting":
        if (self.folder / "refuse").exists():
            raise UserError("the engine ended: no memory (log: x)")
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def ask(self, path: str, body: dict[str, Any]) -> OfflineAnswer:
        with (self.folder / f"{os.getpid()}.asked").open("a") as asked:
            asked.write(f"{body['n']}\n")
        for what in ("die", "end"):
            if len(list(self.folder.glob(f"{what} *"))) < body.get(what, 0):
                (self.folder / f"{what} {len(list(self.folder.glob(f'{what} *')))}").touch()
                if what == "die":
                    os._exit(1)
                raise UserError("the engine ended: killed")
        return OfflineAnswer(200, {"path": path, **body})


def answered(folder: Path, bodies: list[dict[str, Any]]) -> list[tuple[str, OfflineAnswer]]:
    settings = ServeConfig(model="any", store=str(folder))
    requests = [RayRequest(f"request {body['n']}", "/v1/completions", body) for body in bodies]
    return list(answers_on_ray(settings, requests, 2, in_flight=16, engine=Waiting))  # type: ignore[arg-type]


@needs_ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray deprecates a default of its own
def test_each_request_is_answered_once_though_an_actor_and_an_engine_end(tmp_path: Path) -> None:
    """Their blocks are asked again, of two requests each; bodies differ in their fields and come back as they were."""
    bodies: list[dict[str, Any]] = [{"n": n} for n in range(39)]
    bodies[7] |= {"die": 1, "nested": [{"a": None}, 1.5, "\u00e4"]}
    bodies[20] |= {"end": 1}
    answers = answered(tmp_path, bodies)

    assert len(answers) == 39
    assert dict(answers) == {
        f"request {body['n']}": OfflineAnswer(200, {"path": "/v1/completions", **body}) for body in bodies
    }
    counts = Counter(int(line) for path in tmp_path.glob("*.asked") for line in path.read_text().splitlines())
    # Two actors, and the one that came for the one that died.
    assert len(list(tmp_path.glob("*.asked"))) == 3
    assert set(counts) == set(range(39))
    assert min(counts[7], counts[20]) >= 2
    # No more again than what an actor had, twice: eight blocks.
    assert sum(counts.values()) <= 39 + 2 * 16


def said_by_actor(folder: Path, *bodies: dict[str, Any]) -> list[tuple[int, Any]]:
    """What an actor makes of a block, called as Ray does: statuses and bodies."""
    actor = EngineActor(asdict(ServeConfig(model="any", store=str(folder))), Waiting)  # type: ignore[arg-type]
    column = {"custom_id": [body["n"] for body in bodies], "path": ["/v1/completions"] * len(bodies)}
    block = actor({**column, "body": [json.dumps(body) for body in bodies]})
    assert block["custom_id"] == column["custom_id"]
    return [(int(status), json.loads(body)) for status, body in zip(block["status"], block["body"], strict=True)]


@pytest.mark.parametrize("ends", [1, 2, RESTARTS])
def test_an_actor_starts_its_engine_again(tmp_path: Path, ends: int) -> None:
    """And asks it for the whole block again."""
    bodies = [{"n": 0}, {"n": 1, "end": ends}, {"n": 2}]
    assert said_by_actor(tmp_path, *bodies) == [(200, {"path": "/v1/completions", **body}) for body in bodies]


def test_an_engine_that_dies_of_a_request_is_given_up(tmp_path: Path) -> None:
    """After as many restarts as are allowed, in one line; not for ever."""
    ((status, body),) = said_by_actor(tmp_path, {"n": 0, "end": 100})
    assert (status, len(list(tmp_path.glob("end *")))) == (NO_ENGINE, RESTARTS + 1)
    assert re.fullmatch(rf"the engine ended: killed, for the {RESTARTS + 1}th time on \S+", body["reason"])


@needs_ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray deprecates a default of its own
def test_an_engine_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    """With its own reason and the machine; it is not started again."""
    (tmp_path / "refuse").touch()
    with pytest.raises(UserError, match=r"^the engine ended: no memory \(log: x\) on \S+$"):
        answered(tmp_path, [{"n": n} for n in range(3)])


def test_without_ray_the_way_to_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written."""
    monkeypatch.setitem(sys.modules, "ray.data", None)
    write_jsonl(tmp_path / "in.jsonl", [request("one", "any", messages=asked("work"))])
    with pytest.raises(UserError, match=r"Ray is not here .*pip install 'counsel-stack\[ray\]'"):
        batch(BatchConfig(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), base="any", engine="ray"))
    assert not (tmp_path / "out.jsonl").exists()


def is_engine(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return is_alive(process) and bool(re.search(r"offline_process|VLLM", " ".join(process.cmdline())))
    return False


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
def test_a_killed_driver_goes_on_and_every_answer_is_pefts(tiny_model: Base, tmp_path: Path) -> None:
    """Two real engines; killed after six rows, the same command keeps those and asks the others, each once."""
    store, adapters = tmp_path / "store", {}
    for seed, name in enumerate(("calm", "gentle"), start=1):
        adapters[name] = tiny_adapter(tiny_model.path, tmp_path / name, seed=seed)
        adapter_store.publish(store, name, adapters[name], tiny_model, system=SYSTEM if name == "gentle" else "")
    models = ("calm", "gentle", adapter_store.find(store, "gentle").id, tiny_model.name)
    asked_for = [
        request(f"{model} {topic}", model, messages=asked(topic), **GREEDY) for model in models for topic in TOPICS
    ]
    bad = request("bad", "calm", messages=asked("work"), temprature=0)
    write_jsonl(tmp_path / "in.jsonl", [bad, *asked_for])
    write_text(tmp_path / "engine.yaml", ENGINE)
    files = (str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    engine = ("--base", str(tiny_model.path), "--store", str(store), "--engine-config", str(tmp_path / "engine.yaml"))
    words = ("batch", *files, *engine, "--engine", "ray", "--actors", "2", "--concurrency", "16")

    children = kill_when_stopped(command(*words, stops="len(self.done) >= 6"))
    # Not Ray's own agents, which take their time.
    until(lambda: not any(map(is_engine, children)))
    before = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    again = command(*words)
    out, err = again.communicate(timeout=HANG_S)

    rows = {row["custom_id"]: row for row in read_rows(tmp_path / "out.jsonl")}
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert (again.returncode, json.loads(out.splitlines()[-1])["failed"]) == (1, 1), err
    assert len(before) >= 6
    kept = [line for line in before if json.loads(line)["error"] is None]
    assert lines[: len(kept)] == kept
    assert len(lines) == len(rows) == len(asked_for) + 1
    assert rows["bad"]["error"]["message"] == "400: field 'temprature' is unknown here; leave it out"
    for model in models:
        name = model.partition("@")[0]
        conversations = [asked(topic, SYSTEM if name == "gentle" else "") for topic in TOPICS]
        expected = [
            answer.ids for answer in greedy_answers(tiny_model.path, adapters.get(name), conversations, N_TOKENS)
        ]
        bodies = [rows[f"{model} {topic}"]["response"]["body"] for topic in TOPICS]
        assert [body["choices"][0]["token_ids"] for body in bodies] == expected, model
