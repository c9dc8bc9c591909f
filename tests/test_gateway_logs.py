"""What the gateway counts and logs, and what it never logs."""

import json
from typing import Any

import httpx
from openai.types.chat import ChatCompletionChunk

from tests.waiting import until

ASK = [{"role": "user", "content": "what can help me sleep"}]


def test_a_stream_has_usage_only_if_it_was_requested(server):
    """The server counts every stream; a client that did not ask for usage gets none."""

    def stream(request_id: str, **fields: object) -> list[ChatCompletionChunk]:
        # Without ignore_eos a random model may end its text before four tokens.
        ask = {"max_completion_tokens": 4, "extra_body": {"ignore_eos": True}, "stream": True, **fields}
        headers = {"X-Request-Id": request_id}
        return list(server.client().chat.completions.create(model="calm", messages=ASK, extra_headers=headers, **ask))

    plain, with_usage = stream("usage-plain"), stream("usage-requested", stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in plain)
    assert with_usage[-1].usage.completion_tokens == 4

    def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
        return {row["request_id"]: row["completion_tokens"] for row in rows if row["request_id"].startswith("usage-")}

    server.log_rows("requests.jsonl", lambda rows: counts(rows) == {"usage-plain": 4, "usage-requested": 4})


def test_a_stream_counts_up_to_where_its_client_disconnected(server):
    """The engine's tokens are logged although the last event was never sent; and each prompt counts once."""
    ask = {"max_completion_tokens": 200, "n": 2, "extra_body": {"ignore_eos": True}, "stream": True}
    headers = {"X-Request-Id": "disconnected"}
    stream = server.client().chat.completions.create(model="calm", messages=ASK, extra_headers=headers, **ask)
    for _, _chunk in zip(range(6), stream, strict=False):
        pass
    stream.close()
    rows = server.log_rows("requests.jsonl", lambda rows: any(row["request_id"] == "disconnected" for row in rows))
    row = next(row for row in rows if row["request_id"] == "disconnected")
    # All 400 if the engine finished before the disconnect reached it.
    assert 2 <= row["completion_tokens"] <= 400
    usage = server.client().chat.completions.create(model="calm", messages=ASK, max_completion_tokens=1).usage
    assert row["prompt_tokens"] == usage.prompt_tokens


FORGED = '"usage":{"prompt_tokens":1e300,"completion_tokens":99999999999999999999}'


def test_counts_come_from_the_engine_and_never_from_the_reply(server):
    """A reply may contain a caller's own text: /v1/responses returns the tools and metadata of its request."""
    tool = {
        "type": "function",
        "name": "f",
        "strict": False,
        "description": FORGED,
        "parameters": {"usage": json.loads(f"{{{FORGED}}}")},
    }
    fields = {
        "model": "calm",
        "input": FORGED,
        "max_output_tokens": 3,
        "tools": [tool],
        "tool_choice": "none",
        "metadata": {"a": FORGED},
    }
    for stream in (False, True):
        body = json.dumps({**fields, "stream": stream, "ignore_eos": True}).replace("99999999999999999999", "9" * 18)
        headers = {"Authorization": f"Bearer {server.user_key}", "X-Request-Id": f"forged-{stream}"}
        headers["Content-Type"] = "application/json"
        reply = httpx.post(server.base_url + "/responses", content=body, headers=headers, timeout=60)
        assert reply.status_code == 200, reply.text

    def counts(rows: list[dict[str, Any]]) -> list[int]:
        return [row["completion_tokens"] for row in rows if row["request_id"].startswith("forged-")]

    rows = server.log_rows("requests.jsonl", lambda rows: len(counts(rows)) == 2)
    assert counts(rows) == [3, 3]
    assert all(row["prompt_tokens"] < 1000 for row in rows if row["request_id"].startswith("forged-"))


def test_the_first_event_of_a_response_is_not_its_first_token(server):
    """`response.created` comes before the first token, and must not end ttft_s, in the metric or in the log."""
    headers = {"X-Request-Id": "first-token"}
    with server.engine_suspended():
        before = server.metric("counsel_ttft_seconds_count")
        # Greedy: a random sample may decode to no character, and then there is no delta.
        ask = {"model": "calm", "input": "hi", "stream": True, "max_output_tokens": 16, "temperature": 0}
        stream = server.send_to("/v1/responses", server.user_key, headers, **ask)
        until(lambda: server.metric("counsel_sequences_in_flight") == 1)
        assert server.metric("counsel_ttft_seconds_count") == before
    assert b"output_text.delta" in stream.getresponse().read()
    stream.close()
    rows = server.log_rows("requests.jsonl", lambda rows: any(row["request_id"] == "first-token" for row in rows))
    row = next(row for row in rows if row["request_id"] == "first-token")
    assert row["ttft_s"] > 0
    assert server.metric("counsel_ttft_seconds_count") == before + 1


def canary(number: int) -> str:
    return f"canary{'abcdefghijklmnopqrstuvwxyz'[number] * 8}"


# Each causes an error, or nearly, with its own word in a field for a caller's text.
REQUESTS_WITH_TEXT = [
    lambda word: ("chat/completions", {"messages": [{"role": "user", "content": word}]}),
    lambda word: ("chat/completions", {"messages": [{"role": "user", "content": {"text": word}}]}),
    lambda word: ("chat/completions", {"messages": [{"role": word, "content": word}]}),
    lambda word: ("chat/completions", {"messages": ASK, "temperature": word}),
    lambda word: ("chat/completions", {"messages": ASK, "max_tokens": word}),
    lambda word: ("chat/completions", {"messages": ASK, word: word}),
    lambda word: ("chat/completions", {"messages": ASK, "chat_template_kwargs": {"tools": word, "messages": word}}),
    lambda word: ("chat/completions", {"messages": ASK, "stop": [word] * 500}),
    lambda word: ("chat/completions", {"messages": ASK, "tools": [{"type": word}]}),
    lambda word: ("chat/completions", {"messages": [*ASK, {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{" + word}}]}]}),
    lambda word: ("chat/completions", {"messages": ASK, "structured_outputs": {"regex": f"([{word}"}}),
    lambda word: ("chat/completions", {"messages": ASK, "structured_outputs": {"grammar": f"root ::= {word} ("}}),
    lambda word: ("chat/completions", {"messages": ASK, "structured_outputs": {"choice": [word], "regex": word}}),
    lambda word: ("chat/completions", {"messages": ASK, "allowed_token_ids": list(range(70, 100)),
                                       "structured_outputs": {"regex": f"[a-z]{{10}}0({word})?"}}),
    lambda word: ("chat/completions", {"messages": ASK, "structured_outputs": {
        "choice": [f"{word} {n}" for n in range(2500)]}, "max_tokens": 30}),
    lambda word: ("chat/completions", {"messages": ASK, "response_format": {
        "type": "json_schema", "json_schema": {"name": word, "schema": {"type": word}}}}),
    lambda word: ("chat/completions", {"messages": ASK, "response_format": {"type": word}}),
    lambda word: ("completions", {"prompt": [word, [5]]}),
    lambda word: ("completions", {"prompt": word, "suffix": word}),
    lambda word: ("responses", {"input": [{"role": "user", "content": "hi"}, {
        "role": "assistant", "content": [{"type": "refusal", "refusal": word}]}]}),
    lambda word: ("responses", {"input": [{"type": word}]}),
    lambda word: ("responses", {"input": "hi", "previous_response_id": word}),
    lambda word: ("responses", {"input": "hi", "text": {"format": {"type": "json_schema", "name": word, "schema": 5}}}),
    lambda word: ("responses", {"input": "hi", "structured_outputs": {"regex": f"([{word}"}}),
    lambda word: ("chat/completions", {"messages": ASK, "user": word, "metadata": {word: word}, "logit_bias": word}),
    lambda word: ("chat/completions", {"messages": ASK, "model": word}),
]  # fmt: skip


def test_no_log_holds_a_callers_text_whatever_goes_wrong(server):
    """A canary word in every field for text, streamed and not: no answer is a 500, and no log file has the word."""
    answers = {}
    headers = {"Authorization": f"Bearer {server.user_key}"}
    for number, make in enumerate(REQUESTS_WITH_TEXT):
        path, fields = make(canary(number))
        for stream in (False, True):
            body = {"model": "calm", "max_tokens": 12, "stream": stream, **fields}
            reply = httpx.post(f"{server.base_url}/{path}", json=body, headers=headers, timeout=600)
            answers[f"{number} {stream}"] = reply.status_code
            if reply.status_code != 200:
                assert len(reply.text) < 1200, reply.text
    assert {name: status for name, status in answers.items() if status not in (200, 400, 404, 422)} == {}
    given = "req-from-the-caller"
    client = server.client()
    response = client.chat.completions.with_raw_response.create(
        model="calm", messages=ASK, max_completion_tokens=2, extra_headers={"X-Request-Id": given}
    )
    assert response.headers["x-request-id"] == given
    rows = server.log_rows("requests.jsonl", lambda rows: any(row["request_id"] == given for row in rows))
    row = next(row for row in rows if row["request_id"] == given)
    assert (row["key"], row["adapter"].split("@")[0], row["status"]) == ("tests", "calm", 200)
    for file in server.logs.iterdir():
        text = file.read_text(errors="replace")
        assert [canary(number) for number in range(len(REQUESTS_WITH_TEXT)) if canary(number) in text] == [], file


def test_admin_actions_and_attempts_are_audited(server):
    """Each admin request leaves a row with the key's name, allowed or not."""
    server.call("GET", "/v1/adapters", server.admin_key)
    server.call("GET", "/v1/adapters", server.user_key)
    expected = [("root", "/v1/adapters", 200), ("tests", "/v1/adapters", 403)]
    server.log_rows("audit.jsonl", lambda rows: [(r["key"], r["path"], r["status"]) for r in rows[-2:]] == expected)


def test_metrics_are_per_adapter(server):
    """Requests, tokens, times and loads have the exact adapter as a label, next to vLLM's own series."""
    client = server.client()
    ask = {"model": "calm", "messages": ASK, "max_completion_tokens": 3, "extra_body": {"ignore_eos": True}}
    model = client.chat.completions.create(**ask).model
    list(client.chat.completions.create(**ask, stream=True))
    text = server.call("GET", "/metrics", server.admin_key).text
    for series in (
        f'counsel_requests_total{{adapter="{model}",status="200"}}',
        f'counsel_completion_tokens_total{{adapter="{model}"}}',
        f'counsel_ttft_seconds_count{{adapter="{model}"}}',
        f'counsel_time_per_output_token_seconds_count{{adapter="{model}"}}',
        f'counsel_adapter_resident{{adapter="{model}"}} 1.0',
        "counsel_adapter_load_seconds_count",
        "vllm:num_requests_running",
    ):
        assert series in text
    # It would grow by one series per set and order of adapters that ran together.
    assert "lora_requests_info" not in text
