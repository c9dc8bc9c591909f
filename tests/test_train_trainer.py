"""Parts of the trainer: which rows a process counts, and the order of rows."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from train.trainer import EpochLengthSampler, own_rows


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
