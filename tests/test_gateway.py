"""The gate: who may pass where, what is too much, and how a refusal reads to the official SDK."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from counsel.client import make_client
from serve.keys import USER, add_key
from serve.routes import ROUTES
from tests.conftest import ORIGIN, Served
from tests.waiting import until

ASK = [{"role": "user", "content": "what can help me sleep"}]
# What vLLM mounts beside the API, and what it would mount in its development mode: none of it exists here.
CLOSED = [
    ("GET", "/adapters"), ("POST", "/adapters"), ("DELETE", "/adapters/gentle"), ("POST", "/invocations"),
    ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"),
    ("GET", "/ping"), ("POST", "/ping"), ("GET", "/load"), ("GET", "/server_info"),
    ("POST", "/generative_scoring"), ("POST", "/scale_elastic_ep"), ("POST", "/sleep"), ("POST", "/collective_rpc"),
    ("POST", "/reset_prefix_cache"), ("POST", "/v1/messages"), ("POST", "/v1/embeddings"),
    ("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel"), ("POST", "/inference/v1/generate"),
    ("GET", "/v1"), ("GET", "/"), ("GET", "//"), ("GET", "/V1/models"),
]  # fmt: skip


def call(served: Served, method: str, path: str, key: str = "", **rest: object) -> httpx.Response:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    return httpx.request(method, served.base_url.removesuffix("/v1") + path, headers=headers, timeout=60, **rest)


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_routes_that_are_not_on_the_list_do_not_exist_for_anybody(server, method, path):
    """404 without key, with a user's and with an admin's, in the OpenAI error shape."""
    for key in ("", server.user_key, server.admin_key):
        response = call(server, method, path, key)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "unknown_url"


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES))
def test_each_open_route_asks_for_its_role(server, method, path):
    """No key: 401 but for /health and /ready. A user's key: 403 where an admin is needed. The right key: neither."""
    role = ROUTES[(method, path)]
    without, user, admin = (call(server, method, path, key) for key in ("", server.user_key, server.admin_key))
    assert without.status_code == (200 if role == "anyone" else 401)
    assert (user.status_code == 403) == (role == "admin")
    assert admin.status_code not in (401, 403, 404)
    assert call(server, method, path, "wrong").status_code == (200 if role == "anyone" else 401)
    assert call(server, "PUT", path, server.admin_key).status_code == 405


def test_the_sdk_raises_the_exception_that_fits(server):
    """Each refusal arrives as the SDK's own class, with a message that says what to do."""
    user, admin = server.client(), make_client(server.base_url, server.admin_key)

    def chat(client: openai.OpenAI, **changes: object) -> None:
        client.chat.completions.create(**{"model": "calm", "messages": ASK, "max_completion_tokens": 1, **changes})

    with pytest.raises(openai.AuthenticationError, match="API key is unknown"):
        chat(make_client(server.base_url, "nobody"))
    with pytest.raises(openai.PermissionDeniedError, match="admin key"):
        user.get("/adapters", cast_to=dict)
    with pytest.raises(openai.NotFoundError, match="did you mean 'calm'"):
        chat(user, model="clam")
    with pytest.raises(openai.BadRequestError, match="at most 256 is allowed"):
        chat(user, max_completion_tokens=257)
    with pytest.raises(openai.BadRequestError, match="context length"):
        chat(user, messages=[{"role": "user", "content": "sleep " * 2000}])
    with pytest.raises(openai.BadRequestError, match="answers"):
        chat(user, n=65)
    with pytest.raises(openai.APIStatusError, match="larger than 64 KiB") as too_large:
        chat(user, messages=[{"role": "user", "content": "a" * 70_000}])
    assert too_large.value.status_code == 413
    with pytest.raises(openai.NotFoundError, match="not in the store"):
        admin.post("/load_lora_adapter", body={"lora_name": "calm", "lora_path": "/etc"}, cast_to=str)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 20_000])
def test_a_body_that_is_no_json_object_is_a_400(server, raw):
    """Whatever is sent, the caller gets the error shape and the server lives."""
    response = call(server, "POST", "/v1/chat/completions", server.user_key, content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert call(server, "GET", "/health").status_code == 200


def test_bursts_wait_their_turn_up_to_429_for_a_key_and_503_for_the_server(server):
    """64 answers run for a key, 16 wait for a turn and get it, a 17th is a 429; the whole server takes 96 of callers
    that have something in, then 503."""
    client, other = server.client(), make_client(server.base_url, server.admin_key)
    ask = {"model": "calm", "messages": ASK, "max_completion_tokens": 4, "ignore_eos": True}
    asked = {"model": "calm", "messages": ASK}
    with server.standing_still():
        running = server.send(server.user_key, **ask, n=64)
        until(lambda: server.metric("counsel_sequences_in_flight") == 64)
        waiting = server.send(server.user_key, **ask, n=16)
        until(lambda: server.metric("counsel_sequences_in_flight") == 80)
        with pytest.raises(openai.RateLimitError, match="64 answers running of 64 and 16 waiting of 16") as of_key:
            client.chat.completions.create(**asked)
        beside = server.send(server.admin_key, **ask, n=16)
        until(lambda: server.metric("counsel_sequences_in_flight") == 96)
        with pytest.raises(openai.InternalServerError, match="96 answers running or waiting") as of_server:
            other.chat.completions.create(**asked)
    assert (of_key.value.status_code, of_key.value.response.headers["retry-after"]) == (429, "1")
    assert (of_server.value.status_code, of_server.value.response.headers["retry-after"]) == (503, "2")
    for connection, n in ((running, 64), (waiting, 16), (beside, 16)):
        choices = json.loads(connection.getresponse().read())["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["length"] * n
        connection.close()


def test_a_caller_who_hangs_up_leaves_the_line_and_the_engine(server):
    """Whether it waits for its turn or is being answered, its place is free at once and nothing works for it."""
    ask = {"model": "calm", "messages": ASK, "max_completion_tokens": 256, "ignore_eos": True}
    with server.standing_still():
        running = server.send(server.user_key, **ask, n=64, stream=True)
        until(lambda: server.metric("counsel_sequences_in_flight") == 64)
        waiting = server.send(server.user_key, **ask, n=16)
        until(lambda: server.metric("counsel_sequences_in_flight") == 80)
        waiting.close()
        until(lambda: server.metric("counsel_sequences_in_flight") == 64)
        running.close()
        until(lambda: server.metric("counsel_sequences_in_flight") == 0)
    until(lambda: server.metric("vllm:num_requests_running") == 0)


def test_a_key_made_while_the_server_runs_is_known_to_it(server):
    """The key file is reread within seconds; no restart."""
    late = add_key(Path(server.server.config.keys), USER, "late")
    until(lambda: call(server, "GET", "/v1/models", late).status_code == 200)


def test_a_stream_shows_usage_only_to_those_who_asked(server):
    """We need the counts of every stream; a caller who did not ask sees none."""

    def stream(request_id: str, **fields: object) -> list[ChatCompletionChunk]:
        # A random model may say its end of text at any token; here all four are wanted.
        ask = {"max_completion_tokens": 4, "extra_body": {"ignore_eos": True}, "stream": True, **fields}
        headers = {"X-Request-Id": request_id}
        return list(server.client().chat.completions.create(model="calm", messages=ASK, extra_headers=headers, **ask))

    plain, asked = stream("usage-plain"), stream("usage-asked", stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in plain)
    assert asked[-1].usage.completion_tokens == 4

    def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
        return {row["request_id"]: row["completion_tokens"] for row in rows if row["request_id"].startswith("usage-")}

    server.lines("requests.jsonl", lambda rows: counts(rows) == {"usage-plain": 4, "usage-asked": 4})


def test_a_stream_that_its_caller_cut_counts_to_where_it_was_cut(server):
    """What the engine wrote is written down, though the last event never came; and each prompt counts once."""
    ask = {"max_completion_tokens": 200, "n": 2, "extra_body": {"ignore_eos": True}, "stream": True}
    headers = {"X-Request-Id": "cut-short"}
    stream = server.client().chat.completions.create(model="calm", messages=ASK, extra_headers=headers, **ask)
    for _, _chunk in zip(range(6), stream, strict=False):
        pass
    stream.close()
    rows = server.lines("requests.jsonl", lambda rows: any(row["request_id"] == "cut-short" for row in rows))
    row = next(row for row in rows if row["request_id"] == "cut-short")
    # All 400 where the engine was done before the hang-up reached it.
    assert 2 <= row["completion_tokens"] <= 400
    usage = server.client().chat.completions.create(model="calm", messages=ASK, max_completion_tokens=1).usage
    assert row["prompt_tokens"] == usage.prompt_tokens


FORGED = '"usage":{"prompt_tokens":1e300,"completion_tokens":99999999999999999999}'


def test_counts_are_the_engines_and_never_the_callers(server):
    """A caller's words, which a reply may hold, are not read for counts: responses give back tools and metadata."""
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

    rows = server.lines("requests.jsonl", lambda rows: len(counts(rows)) == 2)
    assert counts(rows) == [3, 3]
    assert all(row["prompt_tokens"] < 1000 for row in rows if row["request_id"].startswith("forged-"))


def test_the_first_event_of_a_response_is_not_its_first_token(server):
    """The time to the first token ends with a token, though `response.created` came before; the row says so too."""
    headers = {"X-Request-Id": "first-token"}
    with server.standing_still():
        before = server.metric("counsel_ttft_seconds_count")
        # Greedy: what a random model samples may be no character at all, and then there is no delta.
        ask = {"model": "calm", "input": "hi", "stream": True, "max_output_tokens": 16, "temperature": 0}
        stream = server.send_to("/v1/responses", server.user_key, headers, **ask)
        until(lambda: server.metric("counsel_sequences_in_flight") == 1)
        assert server.metric("counsel_ttft_seconds_count") == before
    assert b"output_text.delta" in stream.getresponse().read()
    stream.close()
    rows = server.lines("requests.jsonl", lambda rows: any(row["request_id"] == "first-token" for row in rows))
    row = next(row for row in rows if row["request_id"] == "first-token")
    assert row["ttft_s"] > 0
    assert server.metric("counsel_ttft_seconds_count") == before + 1


def canary(number: int) -> str:
    return f"canary{'abcdefghijklmnopqrstuvwxyz'[number] * 8}"


# Each makes something go wrong, or nearly, with a word of its own in a field that holds a caller's text.
SPOKEN = [
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


def test_what_a_caller_says_is_in_no_log_whatever_goes_wrong_with_it(server):
    """A canary in every field that holds a text, whole and streamed: no answer is a 500, and no file of ours has it."""
    answers = {}
    headers = {"Authorization": f"Bearer {server.user_key}"}
    for number, make in enumerate(SPOKEN):
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
    rows = server.lines("requests.jsonl", lambda rows: any(row["request_id"] == given for row in rows))
    row = next(row for row in rows if row["request_id"] == given)
    assert (row["key"], row["adapter"].split("@")[0], row["status"]) == ("tests", "calm", 200)
    for file in server.logs.iterdir():
        text = file.read_text(errors="replace")
        assert [canary(number) for number in range(len(SPOKEN)) if canary(number) in text] == [], file


def test_a_schema_error_is_a_line_that_names_the_field(server):
    """Hundreds of complaints of a validator about one field are a few words."""
    for path, fields, field in (
        ("/v1/completions", {"prompt": ["a", [5]] * 30}, "prompt"),
        ("/v1/chat/completions", {"messages": ASK, "temperature": "warm"}, "temperature"),
        ("/v1/chat/completions", {"messages": ASK, "stop": [None] * 300}, "stop"),
    ):
        reply = call(server, "POST", path, server.user_key, json={"model": "calm", **fields})
        error = reply.json()["error"]
        assert reply.status_code == 400
        assert field in error["message"]
        assert "\n" not in error["message"]
        assert len(error["message"]) < 400


def test_paths_may_end_in_a_slash_or_have_one_too_many(server):
    """Clients join a base URL that ends in a slash with a path that begins with one."""
    for path in ("/v1/models/", "/v1//models", "//v1/models", "/v1/models//"):
        assert call(server, "GET", path, server.user_key).json()["object"] == "list"
        assert call(server, "GET", path).status_code == 401
    assert call(server, "GET", "/metrics/", server.user_key).status_code == 403
    body = {"model": "calm", "messages": ASK, "max_tokens": 1}
    assert call(server, "POST", "/v1//chat/completions/", server.user_key, json=body).status_code == 200
    assert call(server, "GET", "/v1/models/calm/", server.user_key).json()["id"] == "calm"


def test_a_server_that_takes_work_is_ready(server):
    """Alive and ready are two questions; both are open to anyone, with and without a slash."""
    for path in ("/health", "/ready", "/ready/"):
        assert call(server, "GET", path).status_code == 200


def test_admin_actions_are_audited_and_so_are_attempts(server):
    """Each admin request leaves a line with the key's name, allowed or not."""
    call(server, "GET", "/v1/adapters", server.admin_key)
    call(server, "GET", "/v1/adapters", server.user_key)
    said = [("root", "/v1/adapters", 200), ("tests", "/v1/adapters", 403)]
    server.lines("audit.jsonl", lambda rows: [(r["key"], r["path"], r["status"]) for r in rows[-2:]] == said)


def test_metrics_tell_adapters_apart(server):
    """Requests, tokens, times and loads appear by exact adapter, beside vLLM's own series."""
    client = server.client()
    ask = {"model": "calm", "messages": ASK, "max_completion_tokens": 3, "extra_body": {"ignore_eos": True}}
    model = client.chat.completions.create(**ask).model
    list(client.chat.completions.create(**ask, stream=True))
    text = call(server, "GET", "/metrics", server.admin_key).text
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
    # It would have a series for each set and order of adapters that ever ran together.
    assert "lora_requests_info" not in text


def test_browsers_may_call_from_origins_that_are_named_and_from_no_others(server):
    """Preflight, answer and refusal carry the permission for the one configured origin, and for no other."""
    allow = "access-control-allow-origin"
    for origin, permission in ((ORIGIN, ORIGIN), ("https://elsewhere.example", None)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization,content-type"
        before = httpx.options(server.base_url + "/chat/completions", headers=asked)
        assert before.headers.get(allow) == permission
        assert before.status_code == (200 if permission else 400)
        for key, status in ((server.user_key, 200), ("nobody", 401)):
            headers = {"Authorization": f"Bearer {key}", "Origin": origin}
            response = httpx.get(server.base_url + "/models", headers=headers)
            assert (response.status_code, response.headers.get(allow)) == (status, permission)


def test_options_without_a_preflight_pass_no_gate(server):
    """Only a browser's preflight needs no key: a bare OPTIONS must not reach what stands behind, such as /metrics."""
    for headers in ({}, {"Origin": ORIGIN}, {"Access-Control-Request-Method": "GET"}):
        response = httpx.options(server.base_url.removesuffix("/v1") + "/metrics", headers=headers)
        assert response.status_code == 405
        assert "vllm:" not in response.text


def test_no_websocket_opens(server):
    """The offer is passed over, as any other, and no route answers."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Authorization": f"Bearer {server.admin_key}"}
    response = httpx.get(server.base_url + "/realtime", headers=upgrade)
    assert response.status_code == 404


def test_what_one_key_asked_is_in_no_other_keys_prefix_cache(server):
    """The same long prompt again is read from the cache for the same key, and computed anew for another."""

    def hits_of(key: str) -> float:
        queries, hits = (server.metric(f"vllm:prefix_cache_{name}_total") for name in ("queries", "hits"))
        messages = [{"role": "user", "content": "thank you for sharing this with me " * 12}]
        reply = make_client(server.base_url, key).chat.completions.create(
            model="calm", messages=messages, max_completion_tokens=1
        )
        # The engine's figures arrive a moment after the answer.
        until(lambda: server.metric("vllm:prefix_cache_queries_total") >= queries + reply.usage.prompt_tokens)
        return server.metric("vllm:prefix_cache_hits_total") - hits

    assert [hits_of(key) > 0 for key in (server.user_key, server.user_key, server.admin_key)] == [False, True, False]


HUGE = 10**12
HOSTILE = [
    {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": float("nan")}, {"min_p": float("nan")},
    {"presence_penalty": float("nan")}, {"frequency_penalty": float("inf")}, {"repetition_penalty": float("nan")},
    {"n": "64"}, {"n": 64.0}, {"n": True}, {"n": -1}, {"n": 0}, {"n": HUGE}, {"max_completion_tokens": "5000"},
    {"max_tokens": 5000.0}, {"max_tokens": -1}, {"seed": HUGE**2}, {"top_k": HUGE}, {"top_k": -7},
    {"min_tokens": 2, "stop_token_ids": [HUGE]}, {"min_tokens": 2, "stop_token_ids": [100_000]},
    {"min_tokens": 2, "stop_token_ids": [-100_000]}, {"allowed_token_ids": [100_000]}, {"allowed_token_ids": [-1]},
    {"allowed_token_ids": []}, {"bad_words": [""]}, {"bad_words": ["\ud800"]}, {"logit_bias": {"100000": 1}},
    {"logit_bias": {"-5": 1}}, {"logit_bias": {"5": float("nan")}}, {"logprobs": True, "top_logprobs": 1000},
    {"logprobs": True, "top_logprobs": -1}, {"prompt_logprobs": 10_000}, {"prompt_logprobs": -1},
    {"stop": [""]}, {"stop": ["a"] * 5000}, {"truncate_prompt_tokens": -5}, {"priority": -HUGE}, {"stream": "maybe"},
    {"messages": []}, {"messages": [{}]}, {"messages": "hi"}, {"messages": [{"role": "user", "content": "\ud800"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    {"chat_template": "{{ ''.__class__.__mro__ }}"}, {"cache_salt": 5}, {"cache_salt": ["x"]}, {"stream_options": 5},
    {"response_format": {"type": "json_schema"}}, {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"grammar": "root ::= root"}}, {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"json": {"$ref": "#"}}}, {"tools": [{}]}, {"tool_choice": "required"},
    {"use_beam_search": True, "n": 3}, {"logits_processors": ["os.system"]}, {"kv_transfer_params": {"x": 1}},
    {"vllm_xargs": {"x": 1}}, {"request_id": "x" * 3000}, {"thinking_token_budget": -3}, {"model": 5},
    {"model": "\ud800"}, {"logprob_token_ids": [100_000]}, {"return_tokens_as_token_ids": 3},
    {"add_generation_prompt": "x"}, {"mm_processor_kwargs": {"x": 1}}, {"documents": [1]},
    {"echo": True, "continue_final_message": True}, {"top_k": HUGE**2, "temperature": 1}, {"priority": HUGE**2},
    {"bad_words": ["a" * 50_000]}, {"stream": "false"}, {"background": True}, {"store": "false"},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]},
]  # fmt: skip


def test_no_request_ends_the_engine(server):
    """Whatever a key holder puts into a field, the answer is an answer or a 4xx, and the next caller gets an answer."""
    odd = {}
    for fields in HOSTILE:
        body = json.dumps({"model": "calm", "messages": ASK, "max_completion_tokens": 3, **fields})
        try:
            response = call(server, "POST", "/v1/chat/completions", server.user_key, content=body)
        except httpx.TransportError as error:
            pytest.fail(f"{str(fields)[:80]} got no answer: {error!r}; before it: {odd}")
        if response.status_code >= 500:
            odd[str(fields)[:80]] = response.text[:200]
    assert odd == {}
    server.client().chat.completions.create(model="calm", messages=ASK, max_completion_tokens=1)
