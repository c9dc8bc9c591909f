"""TRL's SFTTrainer with this project's two changes: an exact validation loss, and a fast path on CPUs."""

from typing import Any

import torch
from trl import SFTTrainer

from train.fast_proof import loss_of, speed_up


class AnswerTrainer(SFTTrainer):
    """SFTTrainer whose `eval_loss` is the mean over answer tokens, whatever the batches.

    The Trainer's own averages over batches, so that it depends on which rows were batched together.
    fast: the same numbers by train/fast_{loss,rows,lora}.py; see train/fast_proof.py for where it applies.
    rows_left_out: training rows that TRL dropped without a word, since cutting them left no answer token.
    """

    def __init__(self, *args: Any, train_dataset: Any, fast: bool, **kwargs: Any) -> None:
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        self.fast = fast
        self.rows_left_out = len(train_dataset) - len(self.train_dataset)
        self._val_sum = self._val_tokens = 0.0
        if fast:
            speed_up(self.model)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.fast:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total = loss_of(model, inputs)
        count = _answer_tokens(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count).clamp(min=1)
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        # As in Trainer: the count is over all processes, and DDP averages their gradients.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = float(_answer_tokens(inputs["labels"]))
        self._val_sum += float(result[0]) * tokens
        self._val_tokens += tokens
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._val_sum = self._val_tokens = 0.0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = torch.tensor([self._val_sum, self._val_tokens], device=self.args.device, dtype=torch.float32)
        total, tokens = self.accelerator.reduce(sums, "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / tokens
        return output


def _answer_tokens(labels: Any) -> Any:
    return (labels[:, 1:] != -100).sum()
