"""Checkpoints that a killed run can trust: written whole, sealed, and recognized when training had ended at one."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer, TrainerState

from counsel.errors import UserError
from train.resume import seal

# Message of the plain RuntimeError that torch's checkpoint writer raises; it has no exception class.
TORCH_WRITER_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")


class SealedCheckpoints(Trainer):
    """A Trainer that seals each checkpoint; the trainers that resume inherit from it, before TRL's own."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITER_ERRORS):
                raise
            reason = " ".join(str(error).split())[:200]
            step = self.state.global_step
            raise UserError(
                f"cannot write the checkpoint of step {step} ({reason}); free some space, then continue with --resume"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def had_ended_at(self, checkpoint: Path, patience: int) -> bool:
        """Whether training had ended at `checkpoint`, by its steps or by early stopping. If so, load the best adapter.

        If it resumed there, the Trainer would keep training.
        """
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
        stopped_early = 0 < patience <= stopping.get("early_stopping_patience_counter", 0)
        if state.global_step < state.max_steps and not stopped_early:
            return False
        self.state = state
        if self.args.load_best_model_at_end:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))
        return True
