"""How a request's body is rewritten before vLLM reads it."""

import pytest

from counsel.store import Manifest
from serve.api_errors import ApiError
from serve.chat_turns import Template, template_in
from serve.request_rewrite import CHAT, COMPLETIONS, RESPONSES, Body, rewrite, weight
from tests.tiny import tiny_manifest, tiny_tokenizer

NO_SYSTEM = Template(system_first=False, system_later=False)
USER_TURN = {"role": "user", "content": "hello"}


def rewritten(path: str, body: Body, manifest: Manifest | None, **conventions: object) -> Body:
    return rewrite(path, body, manifest, max_completion_tokens=100, **conventions)  # type: ignore[arg-type]


def test_the_manifests_system_prompt_comes_first_if_the_request_has_none():
    """Chat gets a system turn, responses get instructions, completions stay raw; a request's own prompt is kept."""
    kind = tiny_manifest("kind", system="Be kind.")
    chat = rewritten(CHAT, {"model": "kind", "messages": [USER_TURN]}, kind)
    assert chat["messages"] == [{"role": "system", "content": "Be kind."}, USER_TURN]
    assert chat["model"] == "kind@000000000000"
    for role in ("system", "developer"):
        own = {"messages": [{"role": role, "content": "Mine."}, USER_TURN]}
        assert rewritten(CHAT, own, kind)["messages"] == own["messages"]
    assert rewritten(RESPONSES, {"input": "hello"}, kind)["instructions"] == "Be kind."
    assert rewritten(RESPONSES, {"input": "hello", "instructions": "Mine."}, kind)["instructions"] == "Mine."
    assert "messages" not in rewritten(COMPLETIONS, {"prompt": "hello"}, kind)
    assert rewritten(CHAT, {"messages": [USER_TURN]}, None)["messages"] == [USER_TURN]


def test_a_template_without_a_system_role_gets_it_in_the_first_user_turn():
    """The manifest's prompt, or the request's own, begins the first user turn; parts become one text."""
    kind = tiny_manifest("kind", system="Be kind.")

    def sent(messages: list[dict[str, object]]) -> object:
        body = rewritten(CHAT, {"messages": messages}, kind, template=NO_SYSTEM)
        return body["messages"]

    assert sent([USER_TURN]) == [{"role": "user", "content": "Be kind.\n\nhello"}]
    parts = {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
    own = {"role": "system", "content": "Mine."}
    assert sent([own, parts, {"role": "assistant", "content": "hi"}]) == [
        {"role": "user", "content": "Mine.\n\nhello"},
        {"role": "assistant", "content": "hi"},
    ]


@pytest.mark.parametrize(
    ("template", "drops"),
    [
        ("{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{% endfor %}", False),
        ("{% for turn in messages if turn.role == 'user' %}{{ turn.content }}{% endfor %}", True),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}", True),
        (None, False),
    ],
    ids=["keeps", "drops", "refuses", "none"],
)
def test_the_bases_template_decides_whether_there_is_a_system_role(template, drops, tmp_path):
    """Only templates that drop the system text, or refuse it, get it in the user turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    assert template_in(tmp_path).system_first is not drops


def test_responses_without_a_system_role_get_instructions_in_the_first_user_turn():
    """Instructions of the request or from the manifest."""
    kind = tiny_manifest("kind", system="Be kind.")
    for given in ("hello", [USER_TURN], [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]):
        body = rewritten(RESPONSES, {"input": given}, kind, template=NO_SYSTEM)
        assert body["input"] == [{"role": "user", "content": "Be kind.\n\nhello"}]
        assert "instructions" not in body
    assert rewritten(RESPONSES, {"input": "hello"}, None, template=NO_SYSTEM)["input"] == "hello"


def test_callers_with_different_keys_never_share_cache_blocks():
    """The salt depends on the key and on the caller's own salt, so a caller cannot choose it."""
    salts = {rewritten(CHAT, {"cache_salt": own}, None, salt=key)["cache_salt"] for key in "ab" for own in ("", "x")}
    assert len(salts) == 4
    assert "cache_salt" not in rewritten(CHAT, {}, None)


def test_every_name_of_the_token_limit_is_bounded():
    """More than the server allows is refused, and the error names the field."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        with pytest.raises(ApiError, match=f"{name} is 101; at most 100") as refused:
            rewritten(CHAT, {name: 101}, None)
        assert (refused.value.status, refused.value.param) == (400, name)
        assert rewritten(CHAT, {name: 100}, None)[name] == 100


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (RESPONSES, {"background": True}, "wait for their answer"),
        # vLLM tests it as a string, which is true, and parses it as false later.
        (RESPONSES, {"background": True, "store": "false"}, "store is 'false'; it must be true or false"),
        (CHAT, {"stream": "false"}, "stream is 'false'"),
        (COMPLETIONS, {"bad_words": ["a" * 5000]}, "4096 characters"),
        (COMPLETIONS, {"bad_words": ["a"] * 129}, "at most 128"),
        (COMPLETIONS, {"bad_words": "a"}, "a list of strings"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is supported"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text is supported"),
    ],
)
def test_background_work_slow_words_and_fetched_addresses_are_refused(path, fields, message):
    """Answers that nobody waits for, words that take a minute to tokenize, addresses to fetch: a clear 400."""
    with pytest.raises(ApiError, match=message) as refused:
        rewritten(path, fields, None)
    assert refused.value.status == 400


def test_responses_are_never_stored():
    """Whatever `store` says."""
    turn = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    assert rewritten(RESPONSES, {"input": [turn], "store": True}, None) == {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "store": False,
    }


@pytest.mark.parametrize(
    ("body", "n"),
    [({}, 1), ({"n": 3}, 3), ({"prompt": "a"}, 1), ({"prompt": ["a", "b"], "n": 2}, 4), ({"prompt": [1, 2, 3]}, 1),
     ({"prompt": [[1], [2, 3]]}, 2), ({"n": None}, 1)],
)  # fmt: skip
def test_a_request_counts_as_the_sequences_it_makes(body, n):
    """`n` times the number of prompts; a list of token ids is one prompt."""
    assert weight(COMPLETIONS, body, 100, 1000) == n


@pytest.mark.parametrize("value", ["64", 64.5, True, [64]])
def test_a_number_of_another_type_is_refused(value):
    """vLLM reads "64" as 64, and it would not be counted here."""
    with pytest.raises(ApiError, match=r"n is .* whole number"):
        weight(CHAT, {"n": value}, 100, 1000)
    with pytest.raises(ApiError, match=r"max_tokens is .* whole number"):
        rewritten(CHAT, {"max_tokens": value}, None)


@pytest.mark.parametrize(
    ("path", "body", "n"),
    [
        # 64 prompts of 4,000 tokens, 21 log-probabilities for each: 5.4 million.
        (COMPLETIONS, {"prompt": [[5] * 4000] * 64, "echo": True, "logprobs": 20, "max_tokens": 1}, 269),
        (COMPLETIONS, {"prompt": [[5] * 4000] * 64, "prompt_logprobs": 20, "max_tokens": 1}, 269),
        (COMPLETIONS, {"prompt": ["x" * 4000] * 64, "prompt_logprobs": 20, "max_tokens": 1}, 269),
        (COMPLETIONS, {"prompt": [[5] * 4000] * 64, "prompt_logprobs": 0, "max_tokens": 1}, 64),
        # A request of lm-eval, and one prompt of a perplexity.
        (COMPLETIONS, {"prompt": [[5] * 1024] * 32, "echo": True, "logprobs": 1, "max_tokens": 1}, 32),
        (COMPLETIONS, {"prompt": "x" * 900_000, "echo": True, "logprobs": 20, "max_tokens": 1}, 5),
        (COMPLETIONS, {"prompt": "x", "n": 64, "logprobs": 20, "max_tokens": 1000}, 68),
        (CHAT, {"messages": [{"content": "x" * 4000}], "prompt_logprobs": 20, "max_tokens": 1}, 5),
        (CHAT, {"n": 64, "logprobs": True, "top_logprobs": 20, "max_tokens": 1000}, 68),
        (CHAT, {"n": 64, "logprobs": True, "max_tokens": 1000}, 64),
        (RESPONSES, {"input": "hi", "top_logprobs": 20, "max_output_tokens": 10}, 1),
    ],
)
def test_a_request_weighs_what_it_makes_the_server_hold(path, body, n):
    """One answer's weight is 20,000 log-probabilities: tokens times candidates, in the prompt and the answer."""
    assert weight(path, body, 1000, 4096) == n


@pytest.mark.parametrize("value", [-1e9, 1e9, 10.5, float("nan"), float("inf"), "1e9"])
def test_a_length_penalty_that_overflows_is_refused(value):
    """4096 ** 1e9 is infinite and 4096 ** -1e9 is 0: beam search would divide by them."""
    with pytest.raises(ApiError, match=r"length_penalty is .* from -10 to 10"):
        rewritten(CHAT, {"messages": [USER_TURN], "length_penalty": value}, None)
    for kept in (-10, 0, 1.0, "1.0", "much", None):
        rewritten(CHAT, {"messages": [USER_TURN], "length_penalty": kept}, None)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"json_object": False}, None),
        ({"json_object": False, "regex": None}, None),
        ({"json_object": False, "regex": "a"}, {"regex": "a"}),
        ({"json_object": True}, {"json_object": True}),
        ({"regex": "a"}, {"regex": "a"}),
    ],
)
def test_a_grammar_that_is_switched_off_is_not_asked_for(given, sent):
    """vLLM counts `json_object: false` as the one grammar of the request, and fails on it."""
    assert (
        rewritten(CHAT, {"messages": [USER_TURN], "structured_outputs": given}, None).get("structured_outputs") == sent
    )


def test_null_and_empty_lists_count_as_not_given():
    """Many clients send them. -1 means no limit, and a whole number may be a float."""
    sent = {"model": "x", "tools": [], "tool_choice": "auto", "stop": None, "bad_words": None, "stream": None}
    sent |= {"stream_options": {"include_usage": True}, "max_tokens": -1, "max_completion_tokens": 5.0}
    assert rewritten(COMPLETIONS, sent, None) == {"model": "x", "max_completion_tokens": 5}
    kept = {"tools": [{}], "tool_choice": "auto", "stream": True, "stream_options": {"include_usage": True}}
    assert rewritten(COMPLETIONS, kept, None) == kept
    # Impossible without tools: vLLM refuses it.
    assert rewritten(COMPLETIONS, {"tools": [], "tool_choice": "required"}, None) == {"tool_choice": "required"}
