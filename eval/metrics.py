"""The metrics by name: title, which direction is better, and the weakness that the reports print next to it."""

from typing import NamedTuple


class Metric(NamedTuple):
    """`better`: "higher", "lower" or "" (neither). `primary`: in the family of the Holm correction."""

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
        "how well human answers are predicted; lower means that a model writes like them, not that it helps",
        primary=True,
    ),
    "nll_per_token": Metric(
        "nats per token", "lower", 3, "the same per token; comparable only between models with the same tokenizer"
    ),
    "similarity_max": Metric(
        "similarity, best reference",
        "higher",
        3,
        "MiniLM cosine; rewards staying on topic: echoing the question scores as high as a counselor",
        primary=True,
    ),
    "similarity_mean": Metric("similarity, mean of references", "higher", 3, "as above, over all references"),
    "greedy_match": Metric(
        "token match F1",
        "higher",
        3,
        "greedy matching of MiniLM token vectors, like BERTScore but not comparable with it",
    ),
    "rouge_1": Metric(
        "ROUGE-1", "higher", 3, "word overlap; hardly separates good from bad answers in conversation", primary=True
    ),
    "rouge_2": Metric(
        "ROUGE-2", "higher", 3, "word-pair overlap; hardly separates good from bad answers in conversation"
    ),
    "rouge_l": Metric(
        "ROUGE-L", "higher", 3, "longest common word sequence; hardly separates good from bad answers in conversation"
    ),
    "bleu": Metric("BLEU (sentence)", "higher", 3, "mean of smoothed sentence BLEU, not corpus BLEU"),
    "chrf": Metric("chrF", "higher", 3, "character n-grams; grows with length up to the references'", primary=True),
    "meteor": Metric("METEOR (exact+stem)", "higher", 3, "without WordNet synonyms, so lower than the usual METEOR"),
    "question_similarity": Metric(
        "similarity to the question", "", 3, "well above the human value means that answers parrot the question"
    ),
    "distinct_2": Metric("distinct-2 in the answer", "", 3, "1 means no repeated word pair; falls with length"),
    "copied": Metric(
        "copied from training", "lower", 3, "share of words in 8-word runs that a training answer has too"
    ),
    "words": Metric("words", "", 1, "max_tokens limits it: see the answers cut by length"),
    "reading_grade": Metric("reading grade", "", 1, "Flesch-Kincaid; text without full stops scores as hard to read"),
}

PRIMARY = tuple(name for name, metric in METRICS.items() if metric.primary)
