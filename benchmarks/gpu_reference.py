"""PEFT's opinion of a server's answers: the log-probability of each token, under the right adapter and the others.

The answers are given to the model as text that is already there (teacher forcing), so one pass per adapter scores all
of them, and a near tie early in an answer does not make the rest incomparable.

The bounds come from PEFT itself. It scores the same tokens in float32 and in bfloat16; their difference is what the
format costs. A server in bfloat16 may differ from float32 by up to twice that in the mean. A greedy token may have lost
to PEFT's best by up to four times the largest difference. Whatever the size of the bounds, the answers of each model
must be nearest to that model: a request answered with another's adapter is found even where the bounds are wide.
"""

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MEAN_FACTOR, TIE_FACTOR = 2.0, 4.0


class Answer(NamedTuple):
    """What a server answered: the model asked, token ids of prompt and answer, each answer token's log-probability."""

    model: str
    prompt: list[int]
    ids: list[int]
    logprobs: list[float]


class Scores(NamedTuple):
    """PEFT's view of an answer's tokens: log-probabilities, and by how much each lost to PEFT's best token."""

    logprobs: list[float]
    lost_by: list[float]


class Reference:
    """The base with adapters in PEFT, in float32 and in bfloat16. adapters: name -> folder."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        self.names = list(adapters)
        self.models = {dtype: _peft_model(base, adapters, dtype) for dtype in ("float32", "bfloat16")}

    def score(self, answers: Sequence[Answer], adapter: str | None, dtype: str) -> list[Scores]:
        """Score all answers with one adapter, or with the base alone (None)."""
        import torch

        model = self.models[dtype]
        if adapter is not None:
            model.set_adapter(adapter)
        with torch.inference_mode(), model.disable_adapter() if adapter is None else contextlib.nullcontext():
            return [_scored(model, answer) for answer in answers]

    def judge(self, answers: Sequence[Answer], weights: Mapping[str, str | None]) -> dict[str, Any]:
        """Are these the answers of the models that were asked?

        weights: model asked -> name of the adapter that it should be, None for the base.
        """
        names: list[str | None] = [None, *self.names]
        exact = {name: self.score(answers, name, "float32") for name in names}
        errors: list[float] = []
        format_costs: list[float] = []
        lost_by: list[float] = []
        mixed_up = {}
        for model, right in weights.items():
            asked = [n for n, answer in enumerate(answers) if answer.model == model]
            given = [answers[n] for n in asked]
            differences = {name: _differences(given, [exact[name][n] for n in asked]) for name in names}
            nearest = min(names, key=lambda name: statistics.fmean(differences[name]))
            if nearest != right:
                mixed_up[model] = nearest or "base"
            own = [exact[right][n] for n in asked]
            rounded = [
                answer._replace(logprobs=scores.logprobs)
                for answer, scores in zip(given, self.score(given, right, "bfloat16"), strict=True)
            ]
            errors += differences[right]
            format_costs += _differences(rounded, own)
            lost_by += [value for scores in own for value in scores.lost_by]
        # A server in float32 differs from PEFT in the last bits, whatever bfloat16 costs.
        bound = max(MEAN_FACTOR * statistics.fmean(format_costs), 1e-4)
        tie = max(TIE_FACTOR * max(format_costs), 1e-3)
        error = statistics.fmean(errors)
        return {
            "ok": error <= bound and max(lost_by) <= tie and not mixed_up,
            "answers": len(answers),
            "tokens": len(errors),
            "greedy_tokens_equal": sum(value == 0 for value in lost_by),
            "worst_lost_by_nats": round(max(lost_by), 5),
            "lost_by_bound_nats": round(tie, 5),
            "logprob_error_mean_nats": round(error, 6),
            "logprob_error_bound_nats": round(bound, 6),
            "mixed_up": mixed_up,
        }


def _differences(answers: Sequence[Answer], scores: Sequence[Scores]) -> list[float]:
    """Per token of all answers, how far its log-probability is from PEFT's."""
    return [
        abs(ours - theirs)
        for answer, score in zip(answers, scores, strict=True)
        for ours, theirs in zip(answer.logprobs, score.logprobs, strict=True)
    ]


def _peft_model(base: Path, adapters: Mapping[str, Path], dtype: str) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), attn_implementation="eager")
    model = model.to(device)
    first, *others = adapters.items()
    # PEFT would keep adapters in float32.
    peft_model = PeftModel.from_pretrained(model, first[1], adapter_name=first[0], autocast_adapter_dtype=False)
    for name, folder in others:
        peft_model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
    return peft_model.to(getattr(torch, dtype)).eval()


def _scored(model: Any, answer: Answer) -> Scores:
    import torch

    ids = torch.tensor([answer.prompt + answer.ids], device=model.device)
    logprobs = model(input_ids=ids).logits[0, len(answer.prompt) - 1 : -1].float().log_softmax(-1)
    own = logprobs.gather(1, ids[0, len(answer.prompt) :, None])[:, 0]
    return Scores(own.tolist(), (logprobs.max(-1).values - own).tolist())
