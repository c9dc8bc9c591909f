"""Word-overlap metrics of one answer against its references, from the libraries that define them.

All are between 0 and 1. With several references ROUGE and METEOR take the best one; BLEU and chrF use their own
multi-reference form. Their common weakness: in conversation a good answer shares few words with another good answer. On
CounselChat, ROUGE-L of one counselor against others is 0.16, and of an answer to a *different* question 0.15: compare
only with the human value and the floors.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any


def rouge(answer: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1, no stemming, each with its best reference. Text without letters a-z or digits scores 0."""
    best = _rouge_scorer().score_multi(list(references), answer)
    return {"rouge_1": best["rouge1"].fmeasure, "rouge_2": best["rouge2"].fmeasure, "rouge_l": best["rougeL"].fmeasure}


def bleu(answer: str, references: Sequence[str]) -> float:
    """Sentence BLEU-4 with exponential smoothing (sacrebleu, tokenizer 13a). Not the corpus BLEU that papers report."""
    return float(_sacrebleu("BLEU").sentence_score(answer, list(references)).score) / 100


def chrf(answer: str, references: Sequence[str]) -> float:
    """chrF2: character n-grams up to 6 (sacrebleu)."""
    return float(_sacrebleu("CHRF").sentence_score(answer, list(references)).score) / 100


def meteor(answer: str, references: Sequence[str]) -> float:
    """METEOR with exact and stemmed matches only: lower than the usual one, which has WordNet's synonyms."""
    from nltk.translate.meteor_score import meteor_score

    tokenize = _rouge_scorer()._tokenizer.tokenize
    return float(meteor_score([tokenize(r) for r in references], tokenize(answer), wordnet=_NoSynonyms()))


class _NoSynonyms:
    """Takes the place of WordNet, which nltk would have to download."""

    def synsets(self, _word: str) -> list[Any]:
        return []


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rapidrouge import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


@lru_cache(maxsize=2)
def _sacrebleu(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(effective_order=True) if name == "BLEU" else CHRF()
