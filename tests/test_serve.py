"""One real server, many adapters: which model answers, what is loaded when, and what a client sees of it."""

import concurrent.futures
from pathlib import Path

import openai
import pytest

from counsel import store as adapter_store
from counsel.client import list_models, make_client
from tests.conftest import SYSTEM, Served
from tests.greedy import greedy_ids
from tests.tiny import tiny_adapter
from tests.waiting import until

ASK = [{"role": "user", "content": "i feel lonely since we moved"}]
ASK_GENTLY = [{"role": "system", "content": SYSTEM}, *ASK]
N_TOKENS = 24
EXACT = {"ignore_eos": True, "return_token_ids": True}
GREEDY = {"temperature": 0, "max_completion_tokens": N_TOKENS, "extra_body": EXACT}


def ask(served: Served, model: str, messages: list[dict[str, str]] = ASK) -> list[int]:
    """The token ids of the greedy answer."""
    reply = served.client().chat.completions.create(model=model, messages=messages, **GREEDY)
    return reply.choices[0].token_ids


def model_ids(served: Served) -> list[str]:
    return [card.id for card in served.client().models.list()]


@pytest.fixture(scope="module")
def expected(server: Served) -> dict[str, list[int]]:
    """PEFT's greedy answers to ASK: the base, `calm`, and `gentle` with its manifest's system prompt."""
    return {
        server.base.name: greedy_ids(server.base.path, None, ASK, N_TOKENS),
        "calm": greedy_ids(server.base.path, server.adapters["calm"], ASK, N_TOKENS),
        "gentle": greedy_ids(server.base.path, server.adapters["gentle"], ASK_GENTLY, N_TOKENS),
    }


def test_each_model_gives_pefts_greedy_answer(server, expected):
    """Base and adapters give PEFT's greedy answer, token for token, and no two are alike."""
    assert {model: ask(server, model) for model in expected} == expected
    assert len({tuple(ids) for ids in expected.values()}) == 3


def test_requests_of_one_batch_keep_their_own_adapter(server, expected):
    """Base and adapter requests that run together are each answered by their own model."""
    models = list(expected) * 4
    with concurrent.futures.ThreadPoolExecutor(len(models)) as pool:
        texts = list(pool.map(lambda model: ask(server, model), models))
    assert texts == [expected[model] for model in models]


def test_a_requests_system_prompt_replaces_the_manifests(server):
    """The manifest's system prompt is for requests that have none."""
    messages = [{"role": "system", "content": "work is hard"}, *ASK]
    assert ask(server, "gentle", messages) == greedy_ids(
        server.base.path, server.adapters["gentle"], messages, N_TOKENS
    )


def test_publish_replace_rollback_and_remove_need_no_restart(server, tmp_path):
    """The whole life of an adapter in a running server; every answer is PEFT's."""
    sources = [tiny_adapter(server.base.path, tmp_path / str(seed), seed=seed) for seed in (11, 12)]
    texts = [greedy_ids(server.base.path, source, ASK, N_TOKENS) for source in sources]

    first = server.publish("fresh", sources[0])
    until(lambda: "fresh" in model_ids(server))
    assert ask(server, "fresh") == texts[0]

    second = server.publish("fresh", sources[1])
    until(lambda: ask(server, "fresh") == texts[1])
    assert ask(server, first.id) == texts[0]
    assert ask(server, second.id) == texts[1]

    adapter_store.rollback(server.store, "fresh")
    until(lambda: ask(server, "fresh") == texts[0])

    adapter_store.remove(server.store, "fresh")
    until(lambda: "fresh" not in model_ids(server))
    with pytest.raises(openai.NotFoundError):
        ask(server, "fresh")


def test_more_adapters_than_the_engine_holds_are_loaded_in_turn(server, tmp_path):
    """Six adapters, two slots and a host cache of four: each is loaded when requested, and gives its own answer."""
    names = [f"turn{seed}" for seed in range(6)]
    sources = [tiny_adapter(server.base.path, tmp_path / name, seed=20 + n) for n, name in enumerate(names)]
    for name, source in zip(names, sources, strict=True):
        server.publish(name, source)
    texts = [greedy_ids(server.base.path, source, ASK, N_TOKENS) for source in sources]
    for _ in range(2):
        assert [ask(server, name) for name in names] == texts
    for name in names:
        adapter_store.remove(server.store, name)


def test_a_pinned_adapter_stays_loaded_and_the_pin_follows_its_name(server, tmp_path):
    """Seven adapters for four places: neither the pinned one nor its next version is evicted."""
    names = [f"passing{n}" for n in range(5)]
    for n, name in enumerate(names):
        server.publish(name, tiny_adapter(server.base.path, tmp_path / name, seed=40 + n))

    def states_while_others_load(kept: adapter_store.Manifest) -> set[str]:
        states = set()
        for name in names:
            ask(server, name)
            states |= {row["state"] for row in adapter_rows(server) if row["id"] == kept.id}
        return states

    first = server.publish("kept", tiny_adapter(server.base.path, tmp_path / "kept1", seed=50))
    adapter_store.pin(server.store, "kept", pinned=True)
    ask(server, "kept")
    until(lambda: all(row["pinned"] for row in adapter_rows(server) if row["id"] == first.id))
    assert states_while_others_load(first) == {"loaded"}

    second = server.publish("kept", tiny_adapter(server.base.path, tmp_path / "kept2", seed=51))
    until(lambda: states_of(server).get(second.id) == "loaded")
    until(lambda: states_of(server).get(first.id) == "published")
    assert states_while_others_load(second) == {"loaded"}
    adapter_store.pin(server.store, "kept", pinned=False)
    until(lambda: not any(row["pinned"] for row in adapter_rows(server)))
    states_while_others_load(second)
    assert states_of(server)[second.id] == "published"
    for name in (*names, "kept"):
        adapter_store.remove(server.store, name)


def adapter_rows(served: Served) -> list[dict[str, object]]:
    return make_client(served.base_url, served.admin_key).get("/adapters", cast_to=dict)["data"]


def states_of(served: Served) -> dict[str, str]:
    return {row["id"]: row["state"] for row in adapter_rows(served)}


def test_an_adapter_for_another_base_is_listed_for_admins_and_never_served(server, tmp_path):
    """Its name is refused with the reason, and not answered by this base."""
    from counsel.catalog import resolve
    from tests.tiny import tiny_base

    other = resolve(str(tiny_base(tmp_path / "other", seed=5)))
    manifest = adapter_store.publish(server.store, "stranger", tiny_adapter(other.path, tmp_path / "a", seed=1), other)
    with pytest.raises(openai.NotFoundError, match="made for base other"):
        ask(server, "stranger")
    assert "stranger" not in model_ids(server)
    assert states_of(server)[manifest.id] == "refused"
    adapter_store.remove(server.store, "stranger")


def test_the_error_for_an_unknown_model_names_the_nearest(server):
    """A typing error raises the SDK's NotFoundError with a suggestion."""
    with pytest.raises(openai.NotFoundError, match="did you mean 'gentle'") as error:
        ask(server, "gentel")
    assert error.value.code == "model_not_found"


def test_the_models_route_has_parent_version_and_state(server):
    """/v1/models lists the base, each name and each exact version."""
    cards = {card.id: card.model_dump() for card in server.client().models.list()}
    version = adapter_store.find(server.store, "calm").version
    assert cards[server.base.name]["parent"] is None
    assert cards["calm"]["parent"] == server.base.name
    assert cards["calm"]["version"] == version
    assert cards[f"calm@{version}"]["state"] in ("loaded", "published")
    assert server.client().models.retrieve("calm").model_dump()["root"] == f"calm@{version}"


def test_the_shared_reader_of_models_knows_what_is_listed(server):
    """Base, adapters by name, and for each name its exact version."""
    models = list_models(server.client())
    manifest = adapter_store.find(server.store, "calm")
    assert models.base == server.base.name
    assert "calm" in models.adapters
    assert manifest.id not in models.names
    assert models.exact("calm") == models.exact(manifest.id) == manifest.id
    assert models.exact(models.base) == models.base
    assert models.max_model_len == server.client().models.retrieve("calm").model_dump()["max_model_len"]


def test_admins_load_and_unload_as_in_vllm(server):
    """/v1/unload_lora_adapter frees an adapter; /v1/load_lora_adapter loads it again, from the store only."""
    admin = make_client(server.base_url, server.admin_key)
    manifest = adapter_store.find(server.store, "calm")
    folder = str(adapter_store.version_dir(server.store, manifest))
    before = len(posts(server.log_rows("audit.jsonl", lambda rows: True)))

    text = admin.post("/unload_lora_adapter", body={"lora_name": "calm"}, cast_to=str)
    assert text == "Success: LoRA adapter 'calm' removed successfully."
    with pytest.raises(openai.NotFoundError, match="unloaded by an admin"):
        ask(server, "calm")
    text = admin.post("/load_lora_adapter", body={"lora_name": "calm", "lora_path": folder}, cast_to=str)
    assert text == "Success: LoRA adapter 'calm' added successfully."
    ask(server, "calm")
    for path in ("/etc", str(Path(folder) / ".." / ".." / ".."), "someone/some-repo"):
        with pytest.raises(openai.NotFoundError, match="not in the store"):
            admin.post("/load_lora_adapter", body={"lora_name": "calm", "lora_path": path}, cast_to=str)
    done = posts(server.log_rows("audit.jsonl", lambda rows: len(posts(rows)) >= before + 5))[before:]
    assert [(row["target"], row["status"]) for row in done[:2]] == [("calm", 200), (f"calm from {folder}", 200)]
    assert [row["status"] for row in done[2:]] == [404] * 3


def posts(rows):
    return [row for row in rows if row["method"] == "POST"]
