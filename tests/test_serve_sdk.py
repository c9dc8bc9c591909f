"""The official SDK, sync and async, against base and adapter."""

import json

import openai
import pytest

from counsel.client import make_async_client, make_client
from tests.conftest import Served
from tests.waiting import until

ASK = [{"role": "user", "content": "talk to a friend"}]
MODELS = ["base", "calm"]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, server: Served) -> str:
    return server.base.name if request.param == "base" else request.param


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return server.client()


def test_a_streamed_chat_answer_equals_the_whole_one(client, model):
    """The greedy text is the same; the stream ends with a finish reason and, if requested, with usage."""
    ask = {"model": model, "messages": ASK, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert whole.model.split("@")[0] == model


async def _async_text(server: Served, model: str) -> tuple[str, str]:
    async with make_async_client(server.base_url, server.user_key) as client:
        ask = {"model": model, "messages": ASK, "max_completion_tokens": 12, "temperature": 0}
        whole = await client.chat.completions.create(**ask)
        stream = await client.chat.completions.create(**ask, stream=True)
        parts = [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
        return whole.choices[0].message.content, "".join(parts)


def test_the_async_client_gets_the_same_answer(server, client, model):
    """Streamed and not."""
    import asyncio

    sync = client.chat.completions.create(model=model, messages=ASK, max_completion_tokens=12, temperature=0)
    assert asyncio.run(_async_text(server, model)) == (sync.choices[0].message.content,) * 2


def test_completions_echo_the_prompt_with_its_log_probabilities(client, model):
    """Echo with logprobs gives a log-probability for each prompt token but the first, as perplexity needs."""
    prompt = "what can help me sleep"
    reply = client.completions.create(model=model, prompt=prompt, max_tokens=1, echo=True, logprobs=1, temperature=0)
    logprobs = reply.choices[0].logprobs
    assert reply.choices[0].text.startswith(prompt)
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.token_logprobs) == reply.usage.prompt_tokens + 1


def test_concurrent_prompt_log_probabilities_are_answered(client, server, model):
    """Several running requests, of one adapter and the base, all get theirs."""
    from concurrent.futures import ThreadPoolExecutor

    def echo(n: int) -> int:
        name = model if n % 2 else server.base.name
        reply = client.completions.create(model=name, prompt="sleep " * (n + 2), max_tokens=1, echo=True, logprobs=1)
        return len(reply.choices[0].logprobs.tokens) - reply.usage.prompt_tokens

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(echo, range(8))) == [1] * 8


def test_the_responses_api_answers_streamed_and_not(client, model):
    """/v1/responses returns text and usage, and its stream ends with `response.completed`."""
    ask = {"model": model, "input": "talk to a friend", "max_output_tokens": 8, "temperature": 0}
    whole = client.responses.create(**ask)
    events = list(client.responses.create(**ask, stream=True))
    assert whole.usage.output_tokens == 8
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == whole.output_text


def test_n_answers_and_seed(client, model):
    """`n` is the number of answers; the same seed repeats them, another seed gives others."""

    def texts(seed: int) -> list[str]:
        reply = client.chat.completions.create(
            model=model, messages=ASK, n=3, seed=seed, temperature=1.0, max_completion_tokens=16
        )
        return [choice.message.content for choice in sorted(reply.choices, key=lambda choice: choice.index)]

    first = texts(1)
    assert len(first) == 3
    assert texts(1) == first
    assert texts(2) != first


def test_stop_ends_the_text_before_the_stop_string(client, model):
    """The stop string is found across tokens, ends the answer and is left out of it."""
    ask = {"model": model, "messages": ASK, "max_completion_tokens": 24, "temperature": 0}
    text = client.chat.completions.create(**ask).choices[0].message.content
    stop = text[4:6]
    choice = client.chat.completions.create(**ask, stop=[stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == text[: text.index(stop)]


def test_logit_bias_forces_a_token(client, model):
    """A bias of 100 on one token id makes the answer that token, repeated."""
    reply = client.chat.completions.create(
        model=model, messages=ASK, max_completion_tokens=4, temperature=0, logit_bias={"40": 100}, logprobs=True
    )
    assert len({entry.token for entry in reply.choices[0].logprobs.content}) == 1


def test_structured_output_keeps_its_schema(client, model):
    """Even a random model writes JSON that fits the schema."""
    schema = {
        "type": "object",
        "properties": {"mood": {"type": "string", "enum": ["low", "fine"]}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model=model,
        messages=ASK,
        max_completion_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "mood", "schema": schema, "strict": True}},
    )
    assert json.loads(reply.choices[0].message.content)["mood"] in ("low", "fine")


def test_a_timeout_raises_and_the_engine_stops_the_request(server, model):
    """APITimeoutError, and soon nothing of the request is in flight.

    The engine is suspended, so that no answer can come before a client on a busy machine has looked at its clock.
    """
    impatient = make_client(server.base_url, server.user_key, timeout_s=0.2)
    with server.engine_suspended(), pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(
            model=model, messages=ASK, max_completion_tokens=256, n=64, extra_body={"ignore_eos": True}
        )
    _until_idle(server)


def test_closing_a_stream_frees_its_place(server, client, model):
    """Closing a stream after three chunks ends the request in the engine and frees its place."""
    stream = client.chat.completions.create(
        model=model, messages=ASK, max_completion_tokens=256, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    _until_idle(server)


def _until_idle(server: Served) -> None:
    until(lambda: server.metric("counsel_sequences_in_flight") == server.metric("vllm:num_requests_running") == 0)


def test_a_seed_holds_when_prompts_are_prefilled_in_chunks(server, client, model):
    """Seeded prompts longer than one step are prefilled in several; answers are the same in a batch and alone.

    Stock vLLM 0.32 on a CPU ends its engine here ("CPU Generator does not use offset"), as this test shows with
    serve/cpu/seeds.py left out of VLLM_PLUGINS.
    """
    from concurrent.futures import ThreadPoolExecutor

    def text(seed: int) -> str:
        messages = [{"role": "user", "content": "what can help me sleep when work is hard " * 12 + str(seed)}]
        reply = client.chat.completions.create(
            model=model, messages=messages, max_completion_tokens=8, temperature=1.0, seed=seed
        )
        assert reply.usage.prompt_tokens > 150
        return reply.choices[0].message.content

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(text, range(6)))
    assert together == [text(seed) for seed in range(6)]
