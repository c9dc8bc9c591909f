"""What the soak publishes: random adapters in a store, with PEFT's answers for each exact version."""

from pathlib import Path
from typing import NamedTuple

from counsel import store as adapter_store
from counsel.catalog import Base, resolve
from tests.greedy import Greedy, greedy_answers
from tests.tiny import tiny_adapter, tiny_base

N_TOKENS = 24
PROMPTS = ("i feel lonely since we moved", "work is hard what can help me sleep")


class Precision(NamedTuple):
    """How far a server's answers may differ from PEFT's in float32.

    near_tie: the server may choose a token that lost with PEFT by less than this many logits. std: standard deviation
    of the adapters' weights, small enough that such differences are rare.
    """

    dtype: str
    near_tie: float
    std: float


EXACTLY = Precision("float32", near_tie=1e-3, std=0.1)
# With weights of std 0.1, bfloat16's rounding moves logits by more than 2. With these it moves them by at most 0.5,
# four of its steps between 16 and 32.
ROUNDED = Precision("bfloat16", near_tie=0.5, std=0.05)


class SoakStore:
    """The adapters on disk, the store they are published into, and PEFT's answers for each exact version."""

    def __init__(self, folder: Path, model: str, n: int, precision: Precision) -> None:
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        # A second thread does not speed up such small products, and slows them when the cores are shared.
        torch.set_num_threads(1)
        self.folder, self.path, self.precision = folder, folder / "store", precision
        self.base: Base = resolve(str(tiny_base(folder / "tiny")) if model == "tiny" else model)
        self.expected: dict[tuple[str, str], Greedy] = {}
        self.live: list[str] = []
        self._n_made = 0
        for prompt, answer in self._answers(None).items():
            self.expected[self.base.name, prompt] = answer
        # Later versions reuse these adapters, but a name never gets the same one twice in a row.
        self.spare = [self.make() for _ in range(n + 8)]
        for number in range(n):
            self.publish(f"adapter{number}")

    def make(self) -> tuple[Path, dict[str, Greedy]]:
        self._n_made += 1
        path = self.folder / str(self._n_made)
        tiny_adapter(self.base.path, path, seed=self._n_made, std=self.precision.std)
        return path, self._answers(path)

    def _answers(self, path: Path | None) -> dict[str, Greedy]:
        conversations = [messages(prompt) for prompt in PROMPTS]
        return dict(zip(PROMPTS, greedy_answers(self.base.path, path, conversations, N_TOKENS), strict=True))

    def publish(self, name: str) -> None:
        path, answers = self.spare.pop(0)
        manifest = adapter_store.publish(self.path, name, path, self.base)
        for prompt, answer in answers.items():
            self.expected[manifest.id, prompt] = answer
        self.spare.append((path, answers))
        if name not in self.live:
            self.live.append(name)

    def remove(self, name: str) -> None:
        self.live.remove(name)
        adapter_store.remove(self.path, name)


def messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
