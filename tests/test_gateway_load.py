"""Many callers at once: who waits, who is refused, and what they never share."""

import json

import openai
import pytest

from counsel.client import make_client
from tests.waiting import until

ASK = [{"role": "user", "content": "what can help me sleep"}]


def test_bursts_wait_then_get_429_per_key_and_503_on_a_full_server(server):
    """64 answers run for a key, 16 wait for their turn and get it, a 17th is a 429; keys with something in flight may
    fill 96 places of the server, then 503."""
    client, other = server.client(), make_client(server.base_url, server.admin_key)
    ask = {"model": "calm", "messages": ASK, "max_completion_tokens": 4, "ignore_eos": True}
    one_more = {"model": "calm", "messages": ASK}
    with server.engine_suspended():
        running = server.send(server.user_key, **ask, n=64)
        until(lambda: server.metric("counsel_sequences_in_flight") == 64)
        waiting = server.send(server.user_key, **ask, n=16)
        until(lambda: server.metric("counsel_sequences_in_flight") == 80)
        with pytest.raises(openai.RateLimitError, match="64 answers running of 64 and 16 waiting of 16") as of_key:
            client.chat.completions.create(**one_more)
        beside = server.send(server.admin_key, **ask, n=16)
        until(lambda: server.metric("counsel_sequences_in_flight") == 96)
        with pytest.raises(openai.InternalServerError, match="96 answers running or waiting") as of_server:
            other.chat.completions.create(**one_more)
    assert (of_key.value.status_code, of_key.value.response.headers["retry-after"]) == (429, "1")
    assert (of_server.value.status_code, of_server.value.response.headers["retry-after"]) == (503, "2")
    for connection, n in ((running, 64), (waiting, 16), (beside, 16)):
        choices = json.loads(connection.getresponse().read())["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["length"] * n
        connection.close()


def test_a_client_that_disconnects_frees_its_place(server):
    """Whether it waits for its turn or is being answered, its place is free at once and the engine stops its work."""
    ask = {"model": "calm", "messages": ASK, "max_completion_tokens": 256, "ignore_eos": True}
    with server.engine_suspended():
        running = server.send(server.user_key, **ask, n=64, stream=True)
        until(lambda: server.metric("counsel_sequences_in_flight") == 64)
        waiting = server.send(server.user_key, **ask, n=16)
        until(lambda: server.metric("counsel_sequences_in_flight") == 80)
        waiting.close()
        until(lambda: server.metric("counsel_sequences_in_flight") == 64)
        running.close()
        until(lambda: server.metric("counsel_sequences_in_flight") == 0)
    until(lambda: server.metric("vllm:num_requests_running") == 0)


def test_prefix_cache_blocks_are_not_shared_between_keys(server):
    """A repeated long prompt is read from the cache for the same key, and computed again for another."""

    def hits_of(key: str) -> float:
        queries, hits = (server.metric(f"vllm:prefix_cache_{name}_total") for name in ("queries", "hits"))
        messages = [{"role": "user", "content": "thank you for sharing this with me " * 12}]
        reply = make_client(server.base_url, key).chat.completions.create(
            model="calm", messages=messages, max_completion_tokens=1
        )
        # The engine's metrics arrive a moment after the answer.
        until(lambda: server.metric("vllm:prefix_cache_queries_total") >= queries + reply.usage.prompt_tokens)
        return server.metric("vllm:prefix_cache_hits_total") - hits

    assert [hits_of(key) > 0 for key in (server.user_key, server.user_key, server.admin_key)] == [False, True, False]
