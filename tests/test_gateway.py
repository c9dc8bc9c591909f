"""The gateway: which routes exist, who may use them, and how an error reads to the official SDK."""

import json
from pathlib import Path

import httpx
import openai
import pytest

from counsel.client import make_client
from serve.keys import USER, add_key
from serve.routes import ROUTES
from tests.conftest import ORIGIN
from tests.waiting import until

ASK = [{"role": "user", "content": "what can help me sleep"}]
# Routes that vLLM mounts besides the API, or in its development mode. None of them exists here.
OTHER_ROUTES = [
    ("GET", "/adapters"), ("POST", "/adapters"), ("DELETE", "/adapters/gentle"), ("POST", "/invocations"),
    ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"),
    ("GET", "/ping"), ("POST", "/ping"), ("GET", "/load"), ("GET", "/server_info"),
    ("POST", "/generative_scoring"), ("POST", "/scale_elastic_ep"), ("POST", "/sleep"), ("POST", "/collective_rpc"),
    ("POST", "/reset_prefix_cache"), ("POST", "/v1/messages"), ("POST", "/v1/embeddings"),
    ("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel"), ("POST", "/inference/v1/generate"),
    ("GET", "/v1"), ("GET", "/"), ("GET", "//"), ("GET", "/V1/models"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), OTHER_ROUTES)
def test_other_routes_do_not_exist_for_anyone(server, method, path):
    """404 without a key, with a user's and with an admin's, in OpenAI's error shape."""
    for key in ("", server.user_key, server.admin_key):
        response = server.call(method, path, key)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "unknown_url"


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES))
def test_each_route_requires_its_role(server, method, path):
    """No key: 401, except for /health and /ready. A user's key: 403 on admin routes. The right key: neither."""
    role = ROUTES[(method, path)]
    without, user, admin = (server.call(method, path, key) for key in ("", server.user_key, server.admin_key))
    assert without.status_code == (200 if role == "anyone" else 401)
    assert (user.status_code == 403) == (role == "admin")
    assert admin.status_code not in (401, 403, 404)
    assert server.call(method, path, "wrong").status_code == (200 if role == "anyone" else 401)
    assert server.call("PUT", path, server.admin_key).status_code == 405


def test_the_sdk_raises_the_matching_exception(server):
    """Each error arrives as the SDK's own class, with a message that names the fix."""
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
def test_a_body_that_is_not_a_json_object_is_a_400(server, raw):
    """For any bytes, the caller gets an error in OpenAI's shape and the server keeps running."""
    response = server.call("POST", "/v1/chat/completions", server.user_key, content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert server.call("GET", "/health").status_code == 200


def test_a_key_made_while_the_server_runs_is_accepted(server):
    """The key file is read again within seconds, without a restart."""
    late = add_key(Path(server.server.config.keys), USER, "late")
    until(lambda: server.call("GET", "/v1/models", late).status_code == 200)


def test_a_schema_error_is_one_line_that_names_the_field(server):
    """Hundreds of a validator's messages about one field become a few words."""
    for path, fields, field in (
        ("/v1/completions", {"prompt": ["a", [5]] * 30}, "prompt"),
        ("/v1/chat/completions", {"messages": ASK, "temperature": "warm"}, "temperature"),
        ("/v1/chat/completions", {"messages": ASK, "stop": [None] * 300}, "stop"),
    ):
        reply = server.call("POST", path, server.user_key, json={"model": "calm", **fields})
        error = reply.json()["error"]
        assert reply.status_code == 400
        assert field in error["message"]
        assert "\n" not in error["message"]
        assert len(error["message"]) < 400


def test_extra_slashes_in_a_path_are_ignored(server):
    """Clients join a base URL that ends in a slash with a path that begins with one."""
    for path in ("/v1/models/", "/v1//models", "//v1/models", "/v1/models//"):
        assert server.call("GET", path, server.user_key).json()["object"] == "list"
        assert server.call("GET", path).status_code == 401
    assert server.call("GET", "/metrics/", server.user_key).status_code == 403
    body = {"model": "calm", "messages": ASK, "max_tokens": 1}
    assert server.call("POST", "/v1//chat/completions/", server.user_key, json=body).status_code == 200
    assert server.call("GET", "/v1/models/calm/", server.user_key).json()["id"] == "calm"


def test_a_running_server_is_healthy_and_ready(server):
    """Both routes are open to anyone, with and without a trailing slash."""
    for path in ("/health", "/ready", "/ready/"):
        assert server.call("GET", path).status_code == 200


def test_browsers_may_call_from_the_allowed_origin_only(server):
    """Preflight, answer and error carry the CORS header for the configured origin, and for no other."""
    allow = "access-control-allow-origin"
    for origin, permission in ((ORIGIN, ORIGIN), ("https://elsewhere.example", None)):
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        preflight["Access-Control-Request-Headers"] = "authorization,content-type"
        allowed = httpx.options(server.base_url + "/chat/completions", headers=preflight)
        assert allowed.headers.get(allow) == permission
        assert allowed.status_code == (200 if permission else 400)
        for key, status in ((server.user_key, 200), ("nobody", 401)):
            headers = {"Authorization": f"Bearer {key}", "Origin": origin}
            response = httpx.get(server.base_url + "/models", headers=headers)
            assert (response.status_code, response.headers.get(allow)) == (status, permission)


def test_an_options_request_that_is_not_a_preflight_is_refused(server):
    """Only a browser's preflight needs no key: a bare OPTIONS must not reach routes such as /metrics."""
    for headers in ({}, {"Origin": ORIGIN}, {"Access-Control-Request-Method": "GET"}):
        response = httpx.options(server.base_url.removesuffix("/v1") + "/metrics", headers=headers)
        assert response.status_code == 405
        assert "vllm:" not in response.text


def test_no_websocket_opens(server):
    """The upgrade is ignored, like any other, and no route answers."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Authorization": f"Bearer {server.admin_key}"}
    response = httpx.get(server.base_url + "/realtime", headers=upgrade)
    assert response.status_code == 404


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
    """Whatever a key holder puts into a field, the reply is an answer or a 4xx, and the next caller is answered."""
    failures = {}
    for fields in HOSTILE:
        body = json.dumps({"model": "calm", "messages": ASK, "max_completion_tokens": 3, **fields})
        try:
            response = server.call("POST", "/v1/chat/completions", server.user_key, content=body)
        except httpx.TransportError as error:
            pytest.fail(f"{str(fields)[:80]} got no answer: {error!r}; before it: {failures}")
        if response.status_code >= 500:
            failures[str(fields)[:80]] = response.text[:200]
    assert failures == {}
    server.client().chat.completions.create(model="calm", messages=ASK, max_completion_tokens=1)
