"""TRL's SFTTrainer with this project's two changes: an exact validation loss, and the fast loss on a CPU."""

from typing import Any

import torch
from trl import SFTTrainer

from train.fast_loss import add_answer_loss, drop_needless_casts


class AnswerTrainer(SFTTrainer):
    """SFTTrainer whose `eval_loss` is the mean over answer tokens, whatever the batches.

    The Trainer's own averages over batches, so that it depends on which rows were batched together.
    fast: use the loss of train/fast_loss.py, which gives the same numbers (see `why_not` for where it applies).
    """

    def __init__(self, *args: Any, fast: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fast = fast
        self._val_sum = self._val_tokens = 0.0
        if fast:
            add_answer_loss(self.model.get_base_model())
            drop_needless_casts(self.model)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.fast:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        features = {key: value for key, value in inputs.items() if key != "labels"}
        total = model(**features, answer_labels=labels)
        count = _answer_tokens(labels) if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count).clamp(min=1)
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens
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
