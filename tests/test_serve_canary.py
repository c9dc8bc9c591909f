"""A canary on a running server: each conversation is answered by one version, which is the one that PEFT has."""

import dataclasses

from counsel import rollout
from counsel import store as adapter_store
from counsel.canary import KEY
from counsel.files import write_json
from serve.__main__ import main
from tests.greedy import greedy_ids
from tests.tiny import tiny_adapter
from tests.waiting import until

N_TOKENS, N_CONVERSATIONS = 6, 12


def _reply(server, model, messages):
    return server.client().chat.completions.create(
        model=model, messages=messages, max_tokens=N_TOKENS, temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip


def _card(server, name):
    cards = server.call("GET", "/v1/models", server.user_key).json()["data"]
    return next((card for card in cards if card["id"] == name), {})


def test_from_publish_to_promotion(server, tmp_path, capsys):
    """A published canary, both sides' answers, its second turns, the log, status, the end by a command."""
    sources = [tiny_adapter(server.base.path, tmp_path / str(seed), seed=seed) for seed in (61, 62)]
    old = server.publish("trial", sources[0])
    flags = ["--store", str(server.store), "--json"]
    publish = ["publish", str(sources[1]), "--name", "trial", "--model", str(server.base.path), "--system", ""]
    assert main([*publish, "--canary", "0.5", *flags]) == 0
    found = rollout.canary_sides(server.store, "trial")
    new = found.new
    assert found.current == old
    until(lambda: _card(server, "trial").get("canary") == {"version": new.version, "share": 0.5})

    asked = [[{"role": "user", "content": f"i feel lonely since day {number}"}] for number in range(N_CONVERSATIONS)]
    source_of = {old.id: sources[0], new.id: sources[1]}
    served = []
    for messages in asked:
        reply = _reply(server, "trial", messages)
        served.append(reply.model)
        expected = greedy_ids(server.base.path, source_of[reply.model], messages, N_TOKENS)
        assert reply.choices[0].token_ids == expected
        more = [*messages, {"role": "assistant", "content": "tell me more"}, {"role": "user", "content": "it is late"}]
        assert _reply(server, "trial", more).model == reply.model
    # One side only has a probability of 1 in 2,000; the salt is drawn, so the sides are as well.
    assert set(served) <= {old.id, new.id}
    for exact in (old.id, new.id):
        assert _reply(server, exact, asked[0]).model == exact

    def chosen(rows):
        return [row for row in rows if row.get("canary") == found.canary.id]

    rows = chosen(server.log_rows("requests.jsonl", lambda rows: len(chosen(rows)) == 2 * N_CONVERSATIONS))
    assert [row["adapter"] for row in rows] == [model for model in served for _ in range(2)]
    assert len({row["unit"] for row in rows}) == N_CONVERSATIONS
    assert all(found.canary.chooses(row["unit"]) == (row["adapter"] == new.id) for row in rows)

    capsys.readouterr()
    assert main(["canary", "status", "trial", "--logs", str(server.logs), *flags]) == 0
    assert str(served.count(new.id)) in capsys.readouterr().out
    assert main(["canary", "promote", "trial", *flags]) == 0
    until(lambda: _card(server, "trial").get("root") == new.id)
    assert {_reply(server, "trial", messages).model for messages in asked} == {new.id}
    adapter_store.remove(server.store, "trial")


def test_each_side_of_every_route(server, tmp_path):
    """A drawn salt that puts this key on each side in turn: chat, completions and responses follow it."""
    sources = [tiny_adapter(server.base.path, tmp_path / str(seed), seed=seed) for seed in (63, 64)]
    new = server.publish("sides", sources[1])
    old = server.publish("sides", sources[0])
    started = rollout.start_canary(server.store, new.id, 0.5, KEY).canary
    client = server.client()

    def models():
        return {
            _reply(server, "sides", [{"role": "user", "content": "hello"}]).model,
            client.completions.create(model="sides", prompt="hello", max_tokens=1).model,
            client.responses.create(model="sides", input="hello", max_output_tokens=1).model,
        }

    for share, expected in ((1e-9, old.id), (1 - 1e-9, new.id)):
        canary = dataclasses.replace(started, share=share)
        write_json(server.store / "sides" / "canary", dataclasses.asdict(canary))
        until(lambda share=share: (_card(server, "sides").get("canary") or {}).get("share") == share)
        assert models() == {expected}
    rollout.end_canary(server.store, "sides")
    until(lambda: _card(server, "sides")["canary"] is None)
    assert models() == {old.id}
    adapter_store.remove(server.store, "sides")
