"""Score every answer of every arm, and the yardsticks: scores.jsonl.

scores.jsonl: one answer per line
| key | meaning |
|---|---|
| `arm`, `question_id`, `sample`, `text`, `finish_reason`, `error` | as in samples.jsonl |
| `scores` | metric name to number (null if undefined); null if the row failed or has no words |

The arms in `YARDSTICKS` are not models. Their answers to the same questions show a metric's floor and ceiling:

    human      each reference scored against the others, averaged; so with one reference fewer
    retrieval  the answer to the nearest training question, by TF-IDF rather than by the encoder that scores it
    shuffled   a human answer to another held-out question
    echo       the question itself
    canned     one reply for everything
"""

from collections.abc import Callable, Mapping, Sequence

from eval.arms import YARDSTICKS
from eval.contamination import nearest_rows
from eval.overlap import bleu, chrf, meteor, rouge
from eval.questions import Question
from eval.samples import Row
from eval.similarity import Encoder, greedy_match, to_references
from eval.text_stats import Copying, distinct, reading_grade, words

CANNED = (
    "Thank you for sharing this with me. I am sorry that you are going through such a hard time. Your feelings are "
    "valid, and you are not alone. It may help to talk to someone you trust, to take care of yourself, and to take "
    "things one step at a time."
)

Scores = dict[str, float | None]


def score_rows(
    samples: Sequence[Row],
    questions: Sequence[Question],
    train_rows: Sequence[Mapping[str, str]],
    encoder: Encoder,
    progress: Callable[[str], None],
) -> list[Row]:
    """One scores.jsonl row per sample, then one per yardstick and question."""
    by_id = {question.question_id: question for question in questions}
    copying = Copying(row["answer"] for row in train_rows)
    rows: list[Row] = [
        {key: sample[key] for key in ("arm", "question_id", "sample", "text", "finish_reason", "error")}
        for sample in samples
    ]
    rows += yardstick_rows(questions, train_rows)
    progress(f"encoding {len(rows)} answers")
    encoder.encode([text for question in questions for text in (question.question, *question.answers)])
    encoder.encode([row["text"] for row in rows if words(row["text"])])
    progress(f"scoring {len(rows)} answers")
    for row in rows:
        question = by_id[row["question_id"]]
        if row["error"] is not None or not words(row["text"]):
            row["scores"] = None
        elif row["arm"] == "human":
            row["scores"] = human_scores(question, encoder)
        else:
            row["scores"] = answer_scores(row["text"], question.question, question.answers, encoder) | {
                "copied": copying.share(row["text"])
            }
    return rows


def answer_scores(answer: str, question: str, references: Sequence[str], encoder: Encoder) -> Scores:
    """Every metric of one answer except copying; `references` must not be empty."""
    encoded, asked, *targets = encoder.encode([answer, question, *references])
    best, mean = to_references(encoded, targets)
    tokens = words(answer)
    return {
        "similarity_max": best,
        "similarity_mean": mean,
        "greedy_match": greedy_match(encoded, targets),
        **rouge(answer, references),
        "bleu": bleu(answer, references),
        "chrf": chrf(answer, references),
        "meteor": meteor(answer, references),
        "question_similarity": float(encoded.text @ asked.text),
        "distinct_2": distinct(tokens, 2),
        "words": float(len(tokens)),
        "reading_grade": reading_grade(answer),
    }


def human_scores(question: Question, encoder: Encoder) -> Scores:
    """Each reference's scores against the others, averaged; needs two references."""
    each = [
        answer_scores(answer, question.question, [*question.answers[:i], *question.answers[i + 1 :]], encoder)
        for i, answer in enumerate(question.answers)
    ]
    columns = {name: [value for scores in each if (value := scores[name]) is not None] for name in each[0]}
    return {name: sum(values) / len(values) if values else None for name, values in columns.items()}


def yardstick_rows(questions: Sequence[Question], train_rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """The yardsticks' answers, in the order of `YARDSTICKS`; `human` only where a question has a second answer."""
    retrieved = [row["answer"] for row in nearest_rows(train_rows, [question.question for question in questions])]
    texts = {
        "human": [question.answers[0] if len(question.answers) > 1 else "" for question in questions],
        "retrieval": retrieved,
        "shuffled": [questions[i - 1].answers[0] for i in range(len(questions))],
        "echo": [question.question for question in questions],
        "canned": [CANNED] * len(questions),
    }
    return [
        {
            "arm": arm,
            "question_id": question.question_id,
            "sample": 0,
            "text": text,
            "finish_reason": None,
            "error": None,
        }
        for arm in YARDSTICKS
        for question, text in zip(questions, texts[arm], strict=True)
        if text
    ]
