"""The gate: who may pass where, what is too much, and how a refusal reads to the official SDK."""

import httpx
import openai
import pytest

from serve.client import make_client
from serve.gateway import ROUTES
from tests.conftest import Served

ASK = [{"role": "user", "content": "what can help me sleep"}]
# What vLLM mounts beside the API, and what it would mount in its development mode: none of it exists here.
CLOSED = [
    ("GET", "/adapters"), ("POST", "/adapters"), ("DELETE", "/adapters/gentle"), ("POST", "/invocations"),
    ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"),
    ("GET", "/ping"), ("POST", "/ping"), ("GET", "/version"), ("GET", "/load"), ("GET", "/server_info"),
    ("POST", "/generative_scoring"), ("POST", "/scale_elastic_ep"), ("POST", "/sleep"), ("POST", "/collective_rpc"),
    ("POST", "/reset_prefix_cache"), ("POST", "/v1/messages"), ("POST", "/v1/embeddings"),
    ("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel"), ("POST", "/inference/v1/generate"),
    ("GET", "//v1/models"), ("GET", "/v1/models/"), ("GET", "/metrics/"), ("POST", "/v1/chat/completions/"),
]  # fmt: skip


def call(served: Served, method: str, path: str, key: str = "", **rest: object) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
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
    """No key: 401 but for /health. A user's key: 403 where an admin is needed. The right key: neither."""
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


def test_more_at_once_than_a_key_may_have_is_a_429_with_retry_after(server):
    """While 64 answers run for a key the next is turned away with a time to wait; then it is served."""
    client = server.client()
    stream = client.chat.completions.create(
        model="calm", messages=ASK, n=64, max_completion_tokens=48, stream=True, extra_body={"ignore_eos": True}
    )
    # All 64 count from the first piece of the first answer to the last piece of the last.
    pieces = [next(stream)]
    with pytest.raises(openai.RateLimitError) as refusal:
        client.chat.completions.create(model="calm", messages=ASK, max_completion_tokens=1)
    pieces += stream
    assert refusal.value.response.headers["retry-after"] == "1"
    finished = [choice.index for piece in pieces for choice in piece.choices if choice.finish_reason]
    assert sorted(finished) == list(range(64))
    client.chat.completions.create(model="calm", messages=ASK, max_completion_tokens=1)


def test_a_stream_shows_usage_only_to_those_who_asked(server):
    """We need the counts of every stream; a caller who did not ask sees none."""
    client = server.client()
    ask = {"model": "calm", "messages": ASK, "max_completion_tokens": 4, "stream": True}
    plain = list(client.chat.completions.create(**ask))
    asked = list(client.chat.completions.create(**ask, stream_options={"include_usage": True}))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)
    assert asked[-1].usage.completion_tokens == 4
    server.lines("requests.jsonl", lambda rows: [row["completion_tokens"] for row in rows[-2:]] == [4, 4])


def test_what_is_written_down_holds_no_text(server):
    """A request's own id, its adapter and its counts are in the log; what was said is in no file of ours."""
    secret = "marmalade skies"
    given = "req-from-the-caller"
    client = server.client()
    response = client.chat.completions.with_raw_response.create(
        model="calm",
        messages=[{"role": "user", "content": secret}],
        max_completion_tokens=2,
        extra_headers={"X-Request-Id": given},
    )
    assert response.headers["x-request-id"] == given
    rows = server.lines("requests.jsonl", lambda rows: any(row["request_id"] == given for row in rows))
    row = next(row for row in rows if row["request_id"] == given)
    assert (row["key"], row["adapter"].split("@")[0], row["status"]) == ("tests", "calm", 200)
    for file in server.logs.iterdir():
        assert secret not in file.read_text(errors="replace"), file


def test_admin_actions_are_audited_and_so_are_attempts(server):
    """Each admin request leaves a line with the key's name, allowed or not."""
    call(server, "GET", "/v1/adapters", server.admin_key)
    call(server, "GET", "/v1/adapters", server.user_key)
    said = [("root", "/v1/adapters", 200), ("tests", "/v1/adapters", 403)]
    server.lines("audit.jsonl", lambda rows: [(r["key"], r["path"], r["status"]) for r in rows[-2:]] == said)


def test_metrics_tell_adapters_apart(server):
    """Requests, tokens, times and loads appear by exact adapter, beside vLLM's own series."""
    client = server.client()
    model = client.chat.completions.create(model="calm", messages=ASK, max_completion_tokens=3).model
    list(client.chat.completions.create(model="calm", messages=ASK, max_completion_tokens=3, stream=True))
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


def test_browsers_of_other_origins_get_no_permission(server):
    """Cross-origin calls are off unless an origin is named."""
    response = httpx.get(
        server.base_url + "/models",
        headers={"Authorization": f"Bearer {server.user_key}", "Origin": "https://elsewhere.example"},
    )
    assert "access-control-allow-origin" not in response.headers
