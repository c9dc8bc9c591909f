"""TRL's SFTTrainer with three changes: an exact validation loss, a row order that resumes, and a fast path on CPUs."""

from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from train.checkpoints import SealedCheckpoints
from train.cpu.proof import fast_loss, speed_up
from train.prompts import TrainRows


class EpochLengthSampler(LengthGroupedSampler):
    """Batches rows of similar length, in an order that depends on seed and epoch only.

    transformers' sampler draws a new order on each call, so a run resumed within an epoch would train some rows twice
    and others not at all.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    # accelerate's data loader calls this before each epoch, as on its own random sampler.
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class AnswerTrainer(SealedCheckpoints, SFTTrainer):
    """SFTTrainer whose `eval_loss` is the mean over answer tokens, independent of batches and processes.

    The Trainer's own averages over batches, so it depends on which rows share a batch, and with several processes it
    counts some rows twice.
    training, validation: the rows; the latter may have none.
    fast: compute the same numbers with train/cpu; train/cpu/proof.py checks where that applies.
    """

    def __init__(self, *args: Any, training: TrainRows, validation: TrainRows, fast: bool, **kwargs: Any) -> None:
        super().__init__(
            *args,
            train_dataset=Dataset.from_list(training.examples()),
            eval_dataset=Dataset.from_list(validation.examples()) if validation.sequences else None,
            **kwargs,
        )
        self.training, self.validation, self.fast = training, validation, fast
        self._val_sum = self._val_tokens = 0.0
        self._val_steps = 0
        if fast:
            speed_up(self.model)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.fast:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total = fast_loss(model, inputs)
        count = _answer_tokens(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count).clamp(min=1)
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        # As in Trainer: the count covers all processes, and DDP averages their gradients.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in (train_dataset or self.train_dataset)["input_ids"]]
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochLengthSampler(rows_per_step, lengths, self.args.data_seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # In file order, which `own_rows` relies on. With group_by_length, the Trainer would shuffle them.
        return torch.utils.data.SequentialSampler(eval_dataset)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        n_own = own_rows(
            len(self.eval_dataset), self.args.per_device_eval_batch_size, self._val_steps,
            self.args.world_size, self.args.process_index,
        )  # fmt: skip
        self._val_steps += 1
        inputs["labels"][n_own:] = -100
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = float(_answer_tokens(inputs["labels"]))
        if tokens:
            self._val_sum += float(result[0]) * tokens
            self._val_tokens += tokens
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._val_sum = self._val_tokens = 0.0
        self._val_steps = 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = torch.tensor([self._val_sum, self._val_tokens], device=self.args.device, dtype=torch.float32)
        total, tokens = self.accelerator.reduce(sums, "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / tokens
        return output


def own_rows(n_rows: int, batch_size: int, step: int, processes: int, process: int) -> int:
    """How many rows of a process's batch are not repeats: accelerate fills the last round with the first rows."""
    start = (step * processes + process) * batch_size
    return min(batch_size, max(0, n_rows - start))


def _answer_tokens(labels: Any) -> Any:
    return (labels[:, 1:] != -100).sum()
