"""From the scores of dialogues to the findings by turn. Pure, and seeded. The unit is the dialogue.

summary.json
| key | meaning |
|---|---|
| `arms` | arm to {`dialogues`, `errors` (dialogues that ended early), `empty` and `cut` (answers), `retries`,
  `metrics`, `drift`} |
| `arms.*.metrics` | metric to turn to {`value`, `low`, `high`, `n`} |
| `arms.*.drift` | metric to turn 8 minus turn 1: the fields of eval.stats.Difference |
| `differences` | list of {`arm`, `against`, `metric`, `turn`, the fields of eval.stats.Difference, `p_holm`}, over the
  dialogues that both arms finished |
| `drifts` | list of {`arm`, `against`, `metric`, the same fields}: an arm's drift minus the other's |
| `onset` | arm to the first turn at which a corrected p is below 0.05, null if there is none |

Drift mixes the model with the script, which says other things at turn 8 than at turn 1. In the difference of two arms'
drifts the script drops out. Holm's correction is over all metrics, tested turns and arms of `differences`, and over all
of `drifts`: families that are fixed before the data are seen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.dialogue.measures import TURN_METRICS, TurnScores
from eval.dialogue.person import TURNS
from eval.samples import Row
from eval.stats import difference, holm, interval, ratio
from eval.text_stats import words

# metric -> turn -> (persona, dialogue) -> value
TurnTable = dict[str, dict[int, dict[tuple[str, int], float]]]
DRIFTING = tuple(name for name, metric in TURN_METRICS.items() if len(metric.tested) > 1)


def turn_table(rows: Sequence[Row], scores: Sequence[Sequence[TurnScores]], arm: str) -> TurnTable:
    """The values of an arm's complete dialogues."""
    table: TurnTable = {metric: {turn: {} for turn in range(1, TURNS + 1)} for metric in TURN_METRICS}
    for row, turns in zip(rows, scores, strict=True):
        if row["arm"] == arm and row["error"] is None:
            for turn, found in enumerate(turns, start=1):
                for metric, value in found.items():
                    if value is not None:
                        table[metric][turn][row["persona"], row["dialogue"]] = value
    return table


def compare_turns(tables: Mapping[str, TurnTable], base: str, seed: int) -> dict[str, Any]:
    """`differences`, `drifts` and `onset` of every arm but the base; empty where the base is not among the arms."""
    others = [arm for arm in tables if arm != base] if base in tables else []
    differences, drifts = [], []
    for arm in others:
        for metric in TURN_METRICS:
            for turn in TURN_METRICS[metric].tested:
                found = _paired(tables[arm][metric][turn], tables[base][metric][turn], seed)
                if found:
                    differences.append({"arm": arm, "against": base, "metric": metric, "turn": turn, **found})
            if metric in DRIFTING and (
                found := _paired(_drift(tables[arm][metric]), _drift(tables[base][metric]), seed)
            ):
                drifts.append({"arm": arm, "against": base, "metric": metric, **found})
    _correct(differences, len(others) * sum(len(metric.tested) for metric in TURN_METRICS.values()))
    _correct(drifts, len(others) * len(DRIFTING))
    onset = {
        arm: min((row["turn"] for row in differences if row["arm"] == arm and significant(row)), default=None)
        for arm in others
    }
    return {"differences": differences, "drifts": drifts, "onset": onset}


def summarize_dialogues(
    rows: Sequence[Row], scores: Sequence[Sequence[TurnScores]], arms: Sequence[str], base: str, seed: int
) -> dict[str, Any]:
    """`arms`, and what `compare_turns` finds."""
    tables = {arm: turn_table(rows, scores, arm) for arm in arms}
    by_arm = {}
    for arm, table in tables.items():
        mine = [row for row in rows if row["arm"] == arm]
        answers = [turn for row in mine for turn in row["turns"] if turn["error"] is None]
        by_arm[arm] = {
            "dialogues": len(mine),
            "errors": sum(row["error"] is not None for row in mine),
            "empty": sum(not words(turn["text"]) for turn in answers),
            "cut": sum(turn["finish_reason"] == "length" for turn in answers),
            "retries": sum(max(0, turn["attempts"] - 1) for row in mine for turn in row["turns"]),
            "metrics": {
                metric: {
                    str(turn): interval(ratio([cells[key] for key in sorted(cells)]), seed)._asdict()
                    for turn, cells in turns.items()
                    if cells
                }
                for metric, turns in table.items()
            },
            "drift": {
                metric: found for metric in DRIFTING if (found := _paired(table[metric][TURNS], table[metric][1], seed))
            },
        }
    return {"arms": by_arm, **compare_turns(tables, base, seed)}


def significant(row: Mapping[str, Any]) -> bool:
    """Whether a difference has a corrected p below 0.05."""
    return row["p_holm"] is not None and row["p_holm"] < 0.05


def _paired(ours: Mapping[Any, float], theirs: Mapping[Any, float], seed: int) -> dict[str, Any] | None:
    keys = sorted(key for key in ours if key in theirs)
    if not keys:
        return None
    found = difference(ratio([ours[key] for key in keys]), ratio([theirs[key] for key in keys]), seed)
    return found._asdict() | {"p_holm": None}


def _drift(turns: Mapping[int, Mapping[Any, float]]) -> dict[Any, float]:
    return {key: value - turns[1][key] for key, value in turns[TURNS].items() if key in turns[1]}


def _correct(rows: list[dict[str, Any]], family: int) -> None:
    """Set each `p_holm`. What could not be measured still counts in the family."""
    for row, p in zip(rows, holm([*(row["p"] for row in rows), *[None] * (family - len(rows))]), strict=False):
        row["p_holm"] = p
