"""From rows and scores to the findings of an evaluation: the parts of summary.json. Pure, and seeded.

summary.json
| key | meaning |
|---|---|
| `format` | `FORMAT`; config.json has it too |
| `run`, `stamp`, `questions`, `samples_per_question`, `references` | what was asked |
| `arms` | name to {`kind` (base, baseline, adapter, yardstick), `metrics`, and counts: `rows` (answers), `likelihoods`,
  `errors` (of both), `empty` (answers without words), `cut` (ended by length), `left_out` (reference answers without
  a likelihood: too long, or not rendered), `retries`, `tokens`, `diversity`} |
| `arms.*.diversity` | distinct word pairs over all word pairs in the first `DIVERSITY_WORDS` words of the arm's first
  answers, joined in the order of the questions; null with fewer words. One reply for everyone makes it small |
| `arms.*.metrics` | metric to {`value`, `low`, `high`, `n`, `missing`}: 95 % interval over n questions; missing: how
  many more questions there should be, but their rows failed or have no words |
| `differences` | list of {`arm`, `against`, `metric`, the fields of eval.stats.Difference, `missing`, `p_holm`}; `wins`
  are questions on which `arm` is better; for a metric without a better side, those on which it is higher |
| `turns` | only with held-out conversations: see eval.conversations.turn_findings |
| `topics` | topic to arm to metric to {`value`, `low`, `high`, `n`}, where n is at least `MIN_TOPIC` |
| `seen` | question_id to why training may have seen it (see eval.contamination.Contamination) |
| `warnings` | what a reader must know before believing a number |
| `spec` | config.json: how the evaluation was made |
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.arms import YARDSTICKS
from eval.likelihood import bits_per_byte
from eval.metrics import METRICS, PRIMARY
from eval.samples import FINAL_ERRORS, Row, failed
from eval.stats import Ratio, difference, holm, interval, ratio
from eval.text_stats import distinct_over, words

PARROT_MARGIN = 0.05
# Of summary.json and config.json.
FORMAT = 4
# Rows that were asked for under an older format are not comparable with today's.
OLDEST_ROWS = 3
OLD_ROWS = (
    "an earlier version asked for these rows, and its likelihoods leave out what the chat template writes before an "
    "answer; evaluate again"
)
MIN_TOPIC = 5
DIVERSITY_WORDS = 1000

# metric -> question_id -> (numerator, denominator)
PerQuestion = dict[str, dict[str, tuple[float, float]]]


def has_old_rows(spec: Mapping[str, Any]) -> bool:
    """Whether the rows of an evaluation with this config.json are too old to compare with today's."""
    return bool(spec.get("format", 0) < OLDEST_ROWS)


def per_question(scores: Iterable[Row], likelihoods: Iterable[Row]) -> dict[str, PerQuestion]:
    """Each arm's metrics by question: the mean over samples; of likelihoods the sums of bits (nats) and bytes (tokens).

    Failed and empty rows are left out, so a question without other rows is missing, not 0.
    """
    table: dict[str, PerQuestion] = {}
    for row in scores:
        for metric, value in (row["scores"] or {}).items():
            if value is not None:
                cells = table.setdefault(row["arm"], {}).setdefault(metric, {})
                total, count = cells.get(row["question_id"], (0.0, 0.0))
                cells[row["question_id"]] = (total + value, count + 1)
    for arm in table.values():
        for cells in arm.values():
            cells.update({key: (total / count, 1.0) for key, (total, count) in cells.items()})
    for row in likelihoods:
        if row["nll_nats"] is None:
            continue
        bits = bits_per_byte(row["nll_nats"], row["bytes"]) * row["bytes"]
        for metric, num, den in (
            ("bits_per_byte", bits, row["bytes"]),
            ("nll_per_token", row["nll_nats"], row["tokens"]),
        ):
            cells = table.setdefault(row["arm"], {}).setdefault(metric, {})
            before = cells.get(row["question_id"], (0.0, 0.0))
            cells[row["question_id"]] = (before[0] + num, before[1] + den)
    return table


def missing(metric: str, arm: str, scores: Iterable[Row], likelihoods: Iterable[Row]) -> set[str]:
    """The questions that an arm's metric lacks because a row failed or no answer has words."""
    if metric in ("bits_per_byte", "nll_per_token"):
        return {row["question_id"] for row in likelihoods if row["arm"] == arm and failed(row)}
    mine = [row for row in scores if row["arm"] == arm]
    scored = {row["question_id"] for row in mine if row["scores"] is not None}
    return {row["question_id"] for row in mine if failed(row) or row["question_id"] not in scored}


def as_ratio(cells: Mapping[str, tuple[float, float]], keys: Sequence[str]) -> Ratio:
    """A metric over these questions, in this order."""
    return ratio([cells[key][0] for key in keys], [cells[key][1] for key in keys])


def paired(
    scores: Sequence[Row], likelihoods: Sequence[Row], pairs: Sequence[tuple[str, str]], seed: int
) -> list[dict[str, Any]]:
    """Every metric's difference for each (arm, against) pair, on what both have; Holm over the primary metrics."""
    differences: list[dict[str, Any]] = []
    for arm, against in pairs:
        table = per_question(scores, shared_likelihoods(likelihoods, (arm, against)))
        for metric in METRICS:
            ours, theirs = table.get(arm, {}).get(metric, {}), table.get(against, {}).get(metric, {})
            keys = sorted(key for key in ours if key in theirs)
            if keys:
                result = difference(as_ratio(ours, keys), as_ratio(theirs, keys), seed)
                if METRICS[metric].better == "lower":
                    result = result._replace(wins=result.losses, losses=result.wins)
                lacking = set().union(*(missing(metric, name, scores, likelihoods) for name in (arm, against)))
                differences.append(
                    {
                        "arm": arm,
                        "against": against,
                        "metric": metric,
                        **result._asdict(),
                        "missing": len(lacking),
                        "p_holm": None,
                    }
                )
    family = [row for row in differences if row["metric"] in PRIMARY]
    # The family is fixed before the data are seen: a metric that was not measured still counts.
    unmeasured = [None] * (len(PRIMARY) * len(pairs) - len(family))
    for row, p in zip(family, holm([*(row["p"] for row in family), *unmeasured]), strict=False):
        row["p_holm"] = p
    return differences


def shared_likelihoods(likelihoods: Sequence[Row], arms: Sequence[str]) -> list[Row]:
    """The arms' likelihoods of the reference answers that all of them have.

    A long answer may fit after one arm's prompt only, and bits per byte differ more between answers than between arms.
    """
    measured = [row for row in likelihoods if row["nll_nats"] is not None]
    by_arm = [{(row["question_id"], row["answer"]) for row in measured if row["arm"] == name} for name in arms]
    common = set.intersection(*by_arm)
    return [row for row in measured if row["arm"] in arms and (row["question_id"], row["answer"]) in common]


def summarize_arms(
    arms: Sequence[str],
    base: str,
    samples: Sequence[Row],
    scores: Sequence[Row],
    likelihoods: Sequence[Row],
    seed: int,
    turns: Sequence[Row] = (),
) -> dict[str, Any]:
    """Counts and intervals of every arm, models first, then yardsticks. Rows of `turns` only add to the counts."""
    table = per_question(scores, likelihoods)
    summaries: dict[str, Any] = {}
    for name in [*arms, *(name for name in YARDSTICKS if name in table)]:
        asked = [row for row in samples if row["arm"] == name]
        scored = [row for row in [*likelihoods, *turns] if row["arm"] == name]
        metrics = {
            metric: interval(as_ratio(cells, sorted(cells)), seed)._asdict()
            | {"missing": len(missing(metric, name, scores, likelihoods))}
            for metric in METRICS
            if (cells := table.get(name, {}).get(metric))
        }
        if "nll_per_token" in metrics:
            metrics["perplexity"] = {
                key: math.exp(value) if key in ("value", "low", "high") and value is not None else value
                for key, value in metrics["nll_per_token"].items()
            }
        summaries[name] = {
            "kind": "yardstick" if name in YARDSTICKS else "base" if name == base else
                    "baseline" if name.startswith(f"{base}/") else "adapter",
            "rows": len(asked),
            "likelihoods": len(scored),
            "errors": sum(failed(row) for row in [*asked, *scored]),
            "empty": sum(row["error"] is None and not words(row["text"]) for row in asked),
            "left_out": sum(row["error"] in FINAL_ERRORS for row in scored),
            "cut": sum(row["finish_reason"] == "length" for row in asked),
            "retries": sum(max(0, row["attempts"] - 1) for row in [*asked, *scored]),
            "tokens": sum(row["completion_tokens"] or 0 for row in asked),
            "diversity": _diversity([row for row in scores if row["arm"] == name and row["scores"] is not None]),
            "metrics": metrics,
        }  # fmt: skip
    return summaries


def _diversity(answers: Sequence[Row]) -> float | None:
    # One answer per question: several similar ones would fill the budget, and the result would depend on --samples.
    # Sorted by question: rows are in order of arrival, which differs between runs.
    ordered = sorted((row for row in answers if row["sample"] == 0), key=lambda row: row["question_id"])
    return distinct_over((row["text"] for row in ordered), 2, DIVERSITY_WORDS)


def by_topic(
    arms: Sequence[str], topics: Mapping[str, str], scores: Sequence[Row], likelihoods: Sequence[Row], seed: int
) -> dict[str, Any]:
    """Primary metrics of each arm by topic, where the arm has at least `MIN_TOPIC` questions of that topic.

    `topics` maps question_id to topic. Slices are not tested: with this many, some differ by chance.
    """
    table = per_question(scores, likelihoods)
    slices: dict[str, Any] = {}
    for topic in sorted(set(topics.values()) - {""}):
        members = {key for key, name in topics.items() if name == topic}
        if len(members) < MIN_TOPIC:
            continue
        slices[topic] = {
            arm: {
                metric: interval(as_ratio(cells, keys), seed)._asdict()
                for metric in PRIMARY
                if (cells := table.get(arm, {}).get(metric))
                and len(keys := sorted(key for key in cells if key in members)) >= MIN_TOPIC
            }
            for arm in arms
        }
    return slices


def warnings(
    arms: Mapping[str, Any],
    likelihoods: Sequence[Row],
    spec: Mapping[str, Any],
    contaminated: Mapping[str, str],
    turns: Sequence[Row] = (),
) -> list[str]:
    """What a reader must know before believing a number.

    `contaminated`: question_id to why training may have seen it.
    """
    lines, base = [], spec["base"]
    if has_old_rows(spec):
        lines.append(OLD_ROWS)
    if contaminated:
        lines.append(
            f"training may have seen {len(contaminated)} of the held-out questions: "
            + ", ".join(sorted(contaminated)[:5])
        )
    human = arms.get("human", {}).get("metrics", {}).get("question_similarity")
    for name, arm in arms.items():
        if arm["kind"] == "yardstick":
            continue
        echo = arm["metrics"].get("question_similarity")
        if human and echo and echo["low"] is not None and echo["low"] > human["value"] + PARROT_MARGIN:
            lines.append(
                f"{name} may be parroting: its answers are more similar to the question ({echo['value']:.3f}) than "
                f"counselors' answers are ({human['value']:.3f}), which raises every similarity"
            )
        if arm["errors"] or arm["empty"]:
            lines.append(
                f"{name}: {arm['errors']} rows failed and {arm['empty']} answers have no words; these are not scored"
            )
        if arm["rows"] and arm["cut"] > arm["rows"] / 2:
            lines.append(f"{name}: {arm['cut']} of {arm['rows']} answers were cut at max_tokens")
        if arm["kind"] == "adapter" and _same_likelihoods(likelihoods, name, base):
            lines.append(f"{name} predicts every answer exactly as {base} does: its weights have no effect")
    for reason in FINAL_ERRORS:
        left_out = sum(row["error"] == reason for row in [*likelihoods, *turns])
        if left_out:
            lines.append(f"{left_out} likelihoods of reference answers are left out: {reason}")
    return lines


def _same_likelihoods(likelihoods: Sequence[Row], one: str, other: str) -> bool:
    def values(arm: str) -> dict[tuple[str, int], float]:
        mine = [row for row in likelihoods if row["arm"] == arm and row["nll_nats"] is not None]
        return {(row["question_id"], row["answer"]): row["nll_nats"] for row in mine}

    ours, theirs = values(one), values(other)
    common = [key for key in ours if key in theirs]
    return bool(common) and all(ours[key] == theirs[key] for key in common)
