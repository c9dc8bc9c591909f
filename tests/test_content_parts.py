"""Turns hold text and tool calls: anything else, in whichever field, is a 400 that names the place."""

import json

import pytest

from serve.api_errors import ApiError
from serve.content_parts import items_of, messages_of

URL = "http://127.0.0.1:9/picture.png"
TEXT = {"type": "text", "text": "hi"}
PARTS = [
    {"type": "image_url", "image_url": {"url": URL}}, {"image_url": URL}, {"image_url": {"url": URL}},
    {"type": None, "image_url": URL}, {"image_url": URL, "uuid": "1"}, {**TEXT, "uuid": "1", "image_url": URL},
    {**TEXT, "image_url": URL}, {**TEXT, "uuid": "1"}, {"audio_url": URL}, {"video_url": URL},
    {"type": "input_image", "image_url": URL, "detail": "auto"}, {"type": "input_audio", "input_audio": {"data": ""}},
    {"type": "file", "file": {"file_data": URL}}, {"type": "image_embeds", "image_embeds": "x"}, {"image_pil": 1},
    {"type": "prompt_embeds", "data": "x"}, {"prompt_embeds": "x"}, {"type": "tool_reference", "name": "x"},
    {"type": "text", "text": {"image_url": URL}}, {"type": "text", "text": None}, {"type": "text"}, {}, 5, None, [TEXT],
    {"type": ["text"], "text": "hi"}, {"type": "a_future_type", "text": "hi"}, {**TEXT, "a_future_field": URL},
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=lambda part: json.dumps(part)[:50])
def test_a_part_that_is_not_exactly_text_is_refused_everywhere(part):
    """In messages of every role, in the input of a responses request, in tool outputs, in reasoning."""
    for role in ("user", "system", "developer", "assistant", "tool"):
        with pytest.raises(ApiError) as refused:
            messages_of([{"role": "user", "content": "hi"}, {"role": role, "content": [TEXT, part]}])
        assert refused.value.status == 400
        assert refused.value.param == "messages.1.content.1"
        with pytest.raises(ApiError, match=r"input\.0\.content\.0"):
            items_of([{"role": role, "content": [part]}])
    for kind in ("function_call_output", "custom_tool_call_output"):
        with pytest.raises(ApiError, match=r"input\.0\.output\.0"):
            items_of([{"type": kind, "call_id": "1", "output": [part]}])
    with pytest.raises(ApiError, match=r"input\.0\.summary\.0"):
        items_of([{"type": "reasoning", "summary": [part]}])


@pytest.mark.parametrize(
    "item",
    [
        {"type": "computer_call_output", "call_id": "1", "output": {"type": "computer_screenshot", "image_url": URL}},
        {"type": "image_generation_call", "result": "x"}, {"type": "item_reference", "id": "1"},
        {"type": "mcp_call", "server_label": "x"}, {"type": "a_future_type"}, {"type": ["message"]}, "hi", None,
        {"type": "function_call_output", "call_id": "1", "output": {"image_url": URL}},
        {"role": "user", "content": {"image_url": URL}}, {"content": "hi"}, {"role": 5, "content": "hi"},
        {"role": "user", "content": "hi", "images": [URL]},
    ],
)  # fmt: skip
def test_an_item_of_another_type_is_refused(item):
    """Only types that are known to hold text, calls or their outputs are accepted."""
    with pytest.raises(ApiError, match=r"input\.0") as refused:
        items_of([item])
    assert refused.value.status == 400


@pytest.mark.parametrize("given", [None, 5, {"role": "user", "content": [{"image_url": URL}]}, True])
def test_turns_must_be_a_list(given):
    """A single object is refused too."""
    with pytest.raises(ApiError, match="messages must be a list"):
        messages_of(given)
    with pytest.raises(ApiError, match="input must be a string or a list"):
        items_of(given)


def test_every_form_of_text_is_accepted_and_extra_fields_are_left_out():
    """Parts become plain text parts; ids, times and cache marks do not reach the engine."""
    cached = {**TEXT, "cache_control": {"type": "ephemeral"}}
    turn = {"role": "user", "content": [cached, {"text": "you"}, "there"], "id": "1", "timestamp": 5, "files": []}
    parts = [TEXT, {"type": "text", "text": "you"}, {"type": "text", "text": "there"}]
    assert messages_of([turn]) == [{"role": "user", "content": parts}]
    refusal = {"role": "assistant", "content": None, "refusal": "I cannot", "tool_calls": []}
    assert messages_of([refusal]) == [{"role": "assistant", "content": "I cannot"}]
    part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot"}]}
    assert messages_of([part]) == [{"role": "assistant", "content": [{"type": "text", "text": "I cannot"}]}]


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "output_text", "text": "a "}, {"type": "output_text", "text": "joke"}],
        [{"type": "output_text", "text": "a joke", "annotations": [], "logprobs": None}],
        [{"type": "refusal", "refusal": "a joke"}],
        [{"type": "input_text", "text": "a joke"}],
    ],
)
@pytest.mark.parametrize("more", [{}, {"type": "message"}, {"id": "msg_9", "status": "completed", "type": "message"}])
def test_an_earlier_answer_is_accepted_in_every_form_that_openai_accepts(parts, more):
    """With and without id and status, and in several parts: vLLM requires both, and reads only the first part."""
    (item,) = items_of([{"role": "assistant", "content": parts, **more}])
    assert [(part["type"], part["text"]) for part in item["content"]] == [("output_text", "a joke")]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["id"] == more.get("id", "msg_0")
