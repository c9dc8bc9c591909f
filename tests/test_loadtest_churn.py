"""New versions are published to a real store while the stand-in is under load."""

import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from counsel import store as adapter_store
from counsel.catalog import Base, resolve
from counsel.files import read_jsonl
from loadtest import churn
from loadtest.run import run_load_test
from loadtest.scenario import Scenario
from tests.sse_server import standin
from tests.tiny import tiny_adapter


@pytest.fixture
def base(tiny_model: Base, tmp_path: Path) -> Base:
    """A base for this test alone, so that the test can remove it."""
    return resolve(str(shutil.copytree(tiny_model.path, tmp_path / "base")))


@pytest.fixture
def churned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], dict]:
    """A run during which new versions are published; replies of the base are held until there are `n`."""

    def run(n: int) -> dict:
        (tmp_path / "q.jsonl").write_text('{"question": "How are you?"}\n')
        publish, left = churn._publish_copy, [n]
        with standin("base.holds-0", "gentle", "calm") as url:

            def counted(*given: object) -> adapter_store.Manifest:
                left[0] -= 1
                try:
                    return publish(*given)  # type: ignore[arg-type]
                finally:
                    if left[0] == 0:
                        urllib.request.urlopen(url.replace("/v1", "/release")).close()

            monkeypatch.setattr(churn, "_publish_copy", counted)
            scenario = {"arrivals": "closed", "requests": 24, "duration_s": 900.0, "churn_s": 0.2,
                        "idle_timeout_s": 3600.0, "request_timeout_s": 3600.0}  # fmt: skip
            return run_load_test(
                Scenario(url=url, prompts=str(tmp_path / "q.jsonl"), out=str(tmp_path / "out"),
                         churn_store=str(tmp_path / "store"), **scenario)  # type: ignore[arg-type]
            )  # fmt: skip

    return run


def test_each_adapter_in_turn_gets_new_versions(base, tmp_path, churned):
    """Two adapters, a new version every 0.2 s: they alternate, and no content is published twice."""
    store = tmp_path / "store"
    for name, system in (("gentle", "you are kind"), ("calm", "")):
        adapter_store.publish(store, name, tiny_adapter(base.path, tmp_path / name, seed=1), base, system=system)
    begun = {name: adapter_store.find(store, name).version for name in ("gentle", "calm")}
    summary = churned(4)

    published = read_jsonl(tmp_path / "out/churn.jsonl")
    assert [row["model"] for row in published[:4]] == ["calm", "gentle", "calm", "gentle"]
    versions = [*begun.values(), *(row["version"] for row in published)]
    assert len(set(versions)) == len(versions)
    assert adapter_store.find(store, "gentle").prompt["system"].startswith("you are kind (load test ")
    assert not any("churn" in reason for reason in summary["invalid"])


def test_a_failed_churn_makes_the_run_invalid(base, tmp_path, churned):
    """The base is gone before the first version is published: the load is sent and reported, with the reason."""
    adapter_store.publish(tmp_path / "store", "gentle", tiny_adapter(base.path, tmp_path / "gentle", seed=1), base)
    shutil.rmtree(base.path)
    summary = churned(1)

    assert summary["verdict"] == "invalid"
    assert any(reason.startswith("churn stopped: ") for reason in summary["invalid"])
    assert set(summary["all"]["outcomes"]) == {"ok"}
    assert (tmp_path / "out/report.html").is_file()
