"""What the gate makes of a request's body before vLLM sees it."""

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


def test_the_manifests_system_text_is_put_first_only_where_there_is_none():
    """Chat gets a system turn, responses get instructions, completions stay raw; a text of the request's own stays."""
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
    """The manifest's text, or the request's own, opens the first user turn; parts become one text."""
    kind = tiny_manifest("kind", system="Be kind.")

    def asked(messages: list[dict[str, object]]) -> object:
        body = rewritten(CHAT, {"messages": messages}, kind, template=NO_SYSTEM)
        return body["messages"]

    assert asked([USER_TURN]) == [{"role": "user", "content": "Be kind.\n\nhello"}]
    parts = {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
    own = {"role": "system", "content": "Mine."}
    assert asked([own, parts, {"role": "assistant", "content": "hi"}]) == [
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
    ids=["keeps", "loses", "refuses", "none"],
)
def test_the_bases_own_template_says_whether_there_is_a_system_role(template, drops, tmp_path):
    """Folding is for templates that lose the system text or refuse it, and for no other."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    assert template_in(tmp_path).system_first is not drops


def test_responses_are_folded_too_where_the_template_has_no_system_role():
    """Instructions, given or from the manifest, open the first user turn."""
    kind = tiny_manifest("kind", system="Be kind.")
    for given in ("hello", [USER_TURN], [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]):
        body = rewritten(RESPONSES, {"input": given}, kind, template=NO_SYSTEM)
        assert body["input"] == [{"role": "user", "content": "Be kind.\n\nhello"}]
        assert "instructions" not in body
    assert rewritten(RESPONSES, {"input": "hello"}, None, template=NO_SYSTEM)["input"] == "hello"


def test_callers_with_different_keys_never_share_cache_blocks():
    """The salt depends on the key and on the caller's own salt, and is never the caller's to choose."""
    salts = {rewritten(CHAT, {"cache_salt": own}, None, salt=key)["cache_salt"] for key in "ab" for own in ("", "x")}
    assert len(salts) == 4
    assert "cache_salt" not in rewritten(CHAT, {}, None)


def test_tokens_are_bounded_under_each_of_their_names():
    """More than the server allows is refused and says which field."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        with pytest.raises(ApiError, match=f"{name} is 101; at most 100") as refusal:
            rewritten(CHAT, {name: 101}, None)
        assert (refusal.value.status, refusal.value.param) == (400, name)
        assert rewritten(CHAT, {name: 100}, None)[name] == 100


@pytest.mark.parametrize(
    ("path", "fields", "says"),
    [
        (RESPONSES, {"background": True}, "wait for their answer"),
        # Text that vLLM asks while it is text, and reads as false later.
        (RESPONSES, {"background": True, "store": "false"}, "store is 'false'; it must be true or false"),
        (CHAT, {"stream": "false"}, "stream is 'false'"),
        (COMPLETIONS, {"bad_words": ["a" * 5000]}, "4096 characters"),
        (COMPLETIONS, {"bad_words": ["a"] * 129}, "at most 128"),
        (COMPLETIONS, {"bad_words": "a"}, "a list of strings"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is read"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text is read"),
    ],
)
def test_what_would_outlive_hold_up_or_send_out_the_server_is_refused(path, fields, says):
    """Answers nobody waits for, words that take a minute to tokenize, addresses to fetch: a clear 400."""
    with pytest.raises(ApiError, match=says) as refused:
        rewritten(path, fields, None)
    assert refused.value.status == 400


def test_nothing_of_a_response_is_kept_for_later():
    """Whatever a caller says of storing; texts in parts pass."""
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
def test_a_request_counts_for_the_sequences_it_makes(body, n):
    """`n` times the number of prompts; a list of token ids is one prompt."""
    assert weight(COMPLETIONS, body, 100, 1000) == n


@pytest.mark.parametrize("value", ["64", 64.5, True, [64]])
def test_a_bound_cannot_be_passed_by_spelling_a_number_otherwise(value):
    """vLLM reads "64" as 64: what we would not count is refused."""
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
        # As lm-eval asks, and as one prompt of a perplexity is asked.
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
    """One answer's weight is 20,000 log-probabilities: tokens times candidates, of the prompt and of the answer."""
    assert weight(path, body, 1000, 4096) == n


def test_null_and_empty_lists_are_taken_as_not_given():
    """As other stacks send them as a matter of course; -1 is no bound, and a whole number may have a point."""
    sent = {"model": "x", "tools": [], "tool_choice": "auto", "stop": None, "bad_words": None, "stream": None}
    sent |= {"stream_options": {"include_usage": True}, "max_tokens": -1, "max_completion_tokens": 5.0}
    assert rewritten(COMPLETIONS, sent, None) == {"model": "x", "max_completion_tokens": 5}
    kept = {"tools": [{}], "tool_choice": "auto", "stream": True, "stream_options": {"include_usage": True}}
    assert rewritten(COMPLETIONS, kept, None) == kept
    # Without tools this cannot be done: vLLM says so.
    assert rewritten(COMPLETIONS, {"tools": [], "tool_choice": "required"}, None) == {"tool_choice": "required"}
