"""A trained adapter and a merged folder, served by real vLLM."""

from pathlib import Path
from typing import Any

import pytest

from counsel import store as adapter_store
from counsel.catalog import resolve
from counsel.chat import prompt_messages
from counsel.client import make_client
from counsel.run import Run
from serve.server import Server
from tests.conftest import Served, tiny_config
from tests.greedy import greedy_answers
from tests.test_serve import EXACT
from tests.train_runs import recipe_for
from tests.waiting import until
from train.merge import Merge, merge
from train.recipe import Recipe

QUESTIONS = ("i feel lonely since we moved", "work is hard", "what can help me sleep")
N_TOKENS = 24


@pytest.fixture(scope="module")
def trained(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run on the served base, published to the server's store."""
    from train.sft import train

    folder = tmp_path_factory.mktemp("work")
    recipe = recipe_for(
        server.base.path, folder, name="trained", attn_implementation="eager", store=str(server.store), samples=0
    )
    train(recipe)
    yield recipe
    adapter_store.remove(server.store, "trained")


def answers(base_url: str, key: str | None, model: str, asked: list[list[dict[str, str]]]) -> list[list[int]]:
    client: Any = make_client(base_url, key) if key else make_client(base_url)
    replies = [
        client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_completion_tokens=N_TOKENS, extra_body=EXACT
        )
        for messages in asked
    ]
    return [reply.choices[0].token_ids for reply in replies]


def test_vllm_and_peft_agree_on_the_trained_adapter(server, trained):
    """The published adapter is served without a restart; its greedy answers are PEFT's, and not the base's.

    The request has no system prompt; the server adds that of the training from the store.
    """
    plain = [prompt_messages(question, "") for question in QUESTIONS]
    with_system = [prompt_messages(question, trained.system) for question in QUESTIONS]
    until(lambda: "trained" in [card.id for card in server.client().models.list()])

    replies = answers(server.base_url, server.user_key, "trained", plain)

    adapter = Run(trained.run_path).adapter
    assert replies == [answer.ids for answer in greedy_answers(server.base.path, adapter, with_system, N_TOKENS)]
    assert replies != [answer.ids for answer in greedy_answers(server.base.path, None, with_system, N_TOKENS)]


@pytest.mark.slow
def test_vllm_and_peft_agree_on_the_merged_folder(server, trained, tmp_path):
    """A server on the merged folder alone answers as PEFT does with base and adapter."""
    asked = [prompt_messages(question, trained.system) for question in QUESTIONS]
    out = Path(tmp_path / "merged")
    merge(Merge(str(trained.run_path), out=str(out), dtype="float32"))

    with Server(tiny_config(tmp_path, resolve(str(out)).path), quiet=True) as merged:
        replies = answers(merged.base_url, None, "merged", asked)

    expected = greedy_answers(server.base.path, Run(trained.run_path).adapter, asked, N_TOKENS)
    assert replies == [answer.ids for answer in expected]
