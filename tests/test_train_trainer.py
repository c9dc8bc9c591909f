"""Parts of the trainer: which rows a process counts, the order of rows, and packed rows."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from counsel.catalog import resolve
from counsel.run import Run
from tests.tiny import tiny_base
from train.arguments import trainer_arguments
from train.hardware import Precision
from train.lora import lora_config
from train.prompts import encode
from train.recipe import Recipe
from train.sft import load_base
from train.trainer import AnswerTrainer, EpochLengthSampler, own_rows


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("n_rows", [1, 2, 5, 6, 7, 12, 13, 23])
def test_each_validation_row_is_counted_once(n_rows, processes):
    """Over the batches that accelerate gives to all processes, each row is counted exactly once."""
    counted = []
    for process in range(processes):
        batches = BatchSamplerShard(BatchSampler(SequentialSampler(range(n_rows)), 3, False), processes, process)
        for step, batch in enumerate(batches):
            counted += batch[: own_rows(n_rows, 3, step, processes, process)]

    assert sorted(counted) == list(range(n_rows))


def test_the_order_by_length_depends_on_seed_and_epoch_only():
    """An epoch has the same order after other random draws; another epoch or seed has another."""
    lengths = torch.randint(1, 99, (64,), generator=torch.Generator().manual_seed(0)).tolist()

    def order(epoch: int, seed: int = 7) -> list[int]:
        torch.rand(3)
        sampler = EpochLengthSampler(4, lengths, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1) == order(1)
    assert sorted(order(1)) == list(range(64))
    assert order(0) != order(1) != order(1, seed=8)
    spread = [max(lengths[i] for i in order(1)[at : at + 4]) - min(lengths[i] for i in order(1)[at : at + 4])
              for at in range(4, 64, 4)]  # fmt: skip
    assert sum(spread) / len(spread) < 40


def first_step(base, folder, rows, packing: bool, max_length: int, batch_size: int) -> tuple[int, float, float, float]:
    """Sequences, then loss, gradient norm and tokens of one step on the CPU, in float32."""
    import transformers

    recipe = Recipe(base=str(base.path), max_length=max_length, batch_size=batch_size, max_steps=1, system="listen")
    precision = Precision("cpu", "float32", False, "adamw_torch_fused", "eager", packing, ())
    transformers.set_seed(0)
    arguments = trainer_arguments(recipe, precision, Run(folder), validate=False)
    arguments.save_strategy = "no"
    model = load_base(recipe, precision, base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.path)
    trainer = AnswerTrainer(
        model=model, args=arguments, processing_class=tokenizer, peft_config=lora_config(recipe), fast=False,
        training=encode(tokenizer, rows, "listen", max_length, "all"), validation=encode(tokenizer, [], "", 16, "all"),
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    return len(trainer.train_dataset), logged["loss"], logged["grad_norm"], logged["num_tokens"]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize(("max_length", "sequences"), [(1000, 1), (120, 3)])
def test_packed_rows_do_not_see_each_other(tmp_path, kind, max_length, sequences):
    """A step on packed rows has the loss, the gradient and the tokens of the same rows padded.

    FlashAttention keeps rows apart on a GPU; here transformers' mask does, from the same positions.
    """
    base = resolve(str(tiny_base(tmp_path / kind, kind)))
    rows = [{"question": "i feel lonely " * n, "answer": "talk to a friend " * n} for n in (1, 2, 3, 1, 4)]
    n_padded, *padded = first_step(base, tmp_path / "padded", rows, False, max_length, 5)
    n_packed, *packed = first_step(base, tmp_path / "packed", rows, True, max_length, sequences)

    assert (n_padded, n_packed) == (5, sequences)
    assert packed == pytest.approx(padded, rel=1e-4)
