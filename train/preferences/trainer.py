"""TRL's DPOTrainer with checkpoints that resume."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from train.checkpoints import SealedCheckpoints
from train.preferences.pairs import Preference
from train.preferences.scores import REFERENCE


class PreferenceTrainer(SealedCheckpoints, DPOTrainer):
    """DPO from a model that already has an adapter; TRL keeps a frozen copy of that as the reference.

    held_out: pairs that are tokenized like the training pairs and not trained on.
    """

    def __init__(
        self,
        model: Any,
        arguments: Mapping[str, Any],
        beta: float,
        training: Sequence[Preference],
        held_out: Sequence[Preference],
        tokenizer: Any,
        progress: Any,
    ) -> None:
        super().__init__(
            model=model,
            args=DPOConfig(**arguments, beta=beta, eval_strategy="no"),
            train_dataset=Dataset.from_list([pair.document() for pair in training]),
            eval_dataset=Dataset.from_list([pair.document() for pair in held_out]),
            processing_class=tokenizer,
            callbacks=[progress],
        )
        self.remove_callback(PrinterCallback)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A resumed run makes the reference anew, from the adapter that it continues from. Of a checkpoint with a folder
        # for it, transformers 5.19 would load that folder alone, and so train from the start again.
        shutil.rmtree(Path(output_dir or self.args.output_dir) / REFERENCE, ignore_errors=True)
