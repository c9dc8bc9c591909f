"""The metrics by name: what each means, which way is better, and its own weakness, said wherever it is printed."""

from typing import NamedTuple


class Metric(NamedTuple):
    """`better`: "higher", "lower" or "" (neither). `primary`: belongs to the family that Holm's correction covers."""

    title: str
    better: str
    digits: int
    note: str
    primary: bool = False


METRICS: dict[str, Metric] = {
    "bits_per_byte": Metric(
        "bits per byte",
        "lower",
        3,
        "how well the human answers are predicted; says that a model writes like them, not that it helps",
        primary=True,
    ),
    "nll_per_token": Metric("nats per token", "lower", 3, "the same per token; only for models with one tokenizer"),
    "similarity_max": Metric(
        "similarity, best reference",
        "higher",
        3,
        "MiniLM cosine; staying on topic is enough: echoing the question scores as high as a counsellor",
        primary=True,
    ),
    "similarity_mean": Metric("similarity, mean of references", "higher", 3, "as above, over all references"),
    "greedy_match": Metric(
        "token match F1",
        "higher",
        3,
        "BERTScore-like greedy matching of MiniLM token vectors; not BERTScore, and not comparable with it",
    ),
    "rouge_1": Metric("ROUGE-1", "higher", 3, "word overlap; nearly blind in conversation", primary=True),
    "rouge_2": Metric("ROUGE-2", "higher", 3, "word-pair overlap; nearly blind in conversation"),
    "rouge_l": Metric("ROUGE-L", "higher", 3, "longest common word sequence; nearly blind in conversation"),
    "bleu": Metric("BLEU (sentence)", "higher", 3, "mean of smoothed sentence BLEU, not corpus BLEU"),
    "chrf": Metric("chrF", "higher", 3, "character n-grams; grows with length up to the references'", primary=True),
    "meteor": Metric("METEOR (exact+stem)", "higher", 3, "without WordNet synonyms, so lower than the usual METEOR"),
    "question_similarity": Metric(
        "similarity to the question", "", 3, "well above the human value means that the answer parrots the question"
    ),
    "distinct_2": Metric("distinct-2 in the answer", "", 3, "1 means no repeated word pair; falls with length"),
    "copied": Metric("copied from training", "lower", 3, "words inside 8-word runs that stand in a training answer"),
    "words": Metric("words", "", 1, "the longest answer allowed cuts it: see the share that ended by length"),
    "reading_grade": Metric("reading grade", "", 1, "Flesch-Kincaid; a text without full stops looks hard"),
}

PRIMARY = tuple(name for name, metric in METRICS.items() if metric.primary)
