"""Word-overlap metrics of one answer against its references, with the public libraries that define them.

All are between 0 and 1, and all take the best or pooled match over several references, as each was defined: ROUGE and
METEOR the best reference, BLEU and chrF their own multi-reference form. Their common weakness: in conversation a good
answer shares few words with another good answer. On CounselChat, ROUGE-L of one counsellor against others is 0.16, and
of an answer to a *different* question 0.15: read them only beside the human value and the floors.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any


def rouge(answer: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1, no stemming, best reference each. Text without any letter or digit a-z scores 0."""
    best = _rouge_scorer().score_multi(list(references), answer)
    return {"rouge_1": best["rouge1"].fmeasure, "rouge_2": best["rouge2"].fmeasure, "rouge_l": best["rougeL"].fmeasure}


def bleu(answer: str, references: Sequence[str]) -> float:
    """Sentence BLEU-4 with exponential smoothing (sacrebleu, tokenizer 13a). Not the corpus BLEU that papers report."""
    return float(_sacrebleu("BLEU").sentence_score(answer, list(references)).score) / 100


def chrf(answer: str, references: Sequence[str]) -> float:
    """chrF2: character n-grams up to 6 (sacrebleu)."""
    return float(_sacrebleu("CHRF").sentence_score(answer, list(references)).score) / 100


def meteor(answer: str, references: Sequence[str]) -> float:
    """METEOR by exact and stemmed matches only: without WordNet's synonyms, so lower than the usual one."""
    from nltk.translate.meteor_score import meteor_score

    tokenize = _rouge_scorer()._tokenizer.tokenize
    return float(meteor_score([tokenize(r) for r in references], tokenize(answer), wordnet=_NoSynonyms()))


class _NoSynonyms:
    """Stands where nltk wants WordNet, which is a download of its own."""

    def synsets(self, _word: str) -> list[Any]:
        return []


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rapidrouge import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


@lru_cache(maxsize=2)
def _sacrebleu(name: str) -> Any:
    from sacrebleu import metrics

    return metrics.BLEU(effective_order=True) if name == "BLEU" else metrics.CHRF()
