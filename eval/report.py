"""The findings as text: for the terminal and report.md; and the tables that the page shares with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from counsel.report.tables import markdown_table, text_table
from eval.judge.rubric import HOLD_FOR_NOISE, RUBRIC
from eval.metrics import METRICS, PRIMARY
from eval.summary import DIVERSITY_WORDS

_ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
TURNS_TITLE = "Conversations by turn"
TEST_NOTE = (
    "p: paired permutation test over questions. Those of the primary metrics are Holm-corrected together; others are "
    "uncorrected, in parentheses. ↑ and ↓: the better direction."
)
ARMS_NOTE = (
    "Yardsticks are not models. human: one counselor against the others. retrieval: the answer to the nearest training "
    "question. shuffled, echo, canned: a counselor's answer to another question, the question itself, one reply for "
    "every question. A metric is informative if it puts a model above the last three and near human."
)
COUNTS_NOTE = (
    "Failed rows and empty answers are not scored. distinct-2 of all answers: distinct word pairs in an arm's first "
    f"{DIVERSITY_WORDS} words; low when the replies are alike."
)


def evaluation_finding(summary: Mapping[str, Any]) -> str:
    """What the primary metrics show, in one sentence per adapter."""
    base = base_of(summary)
    sentences = [_finding(changes, name, str(base)) for name, changes in compared(summary).items()]
    return " ".join(sentences) or "No adapter was compared with the base."


def _finding(changes: Sequence[Mapping[str, Any]], name: str, base: str) -> str:
    by_result: dict[str, list[str]] = {"better": [], "worse": [], "": []}
    for change in changes:
        if change["metric"] in PRIMARY:
            by_result[result(change)].append(METRICS[change["metric"]].title)
    n = sum(map(len, by_result.values()))
    if not n:
        return f"No primary metric of {name} was measured."
    parts = [
        f"{words} {len(titles)} ({'; '.join(titles)})"
        for words, titles in (
            ("better on", by_result["better"]),
            ("worse on", by_result["worse"]),
            ("not significantly different on", by_result[""]),
        )
        if titles
    ]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"Of {n} primary metrics, {name} is {listed}, compared with {base}."


def terminal(summary: Mapping[str, Any]) -> str:
    """The text that ends an evaluation."""
    blocks = [
        f"{summary['questions']} held-out questions of {summary['run']}. Brackets: 95 % intervals over questions."
    ]
    blocks += [text_table(beside(summary, name)) for name in compared(summary)]
    blocks.append(text_table(all_arms(summary)))
    if "turns" in summary:
        blocks += [turns_note(summary), text_table(by_turn(summary))]
    if any(row["p_holm"] is not None for row in summary["differences"]):
        blocks.append(
            f"p: paired permutation test, Holm-corrected over the primary metrics ({', '.join(PRIMARY)}); others are "
            "uncorrected,\nin parentheses. ↑ ↓: the better direction. human: one counselor against the others; "
            "shuffled, echo, canned: floors."
        )
        blocks.append(evaluation_finding(summary))
    blocks += [f"! {warning}" for warning in summary["warnings"]]
    return "\n\n".join(blocks)


def markdown(summary: Mapping[str, Any]) -> str:
    """The same findings, the limits of every metric, and how they were measured."""
    parts = [f"# Evaluation of {summary['run']}", evaluation_finding(summary), lead(summary)]
    if summary["warnings"]:
        parts.append("## Limits of this evaluation\n\n" + "\n".join(f"- {warning}" for warning in summary["warnings"]))
    for name in compared(summary):
        parts.append(f"## {name} compared with {base_of(summary)}\n\n" + markdown_table(beside(summary, name)))
    parts.append(f"## Every arm\n\n{ARMS_NOTE}\n\n" + markdown_table(all_arms(summary)))
    if "turns" in summary:
        parts.append(f"## {TURNS_TITLE}\n\n{turns_note(summary)}\n\n" + markdown_table(by_turn(summary)))
    parts.append(f"## Counts\n\n{COUNTS_NOTE}\n\n" + markdown_table(counts(summary)))
    parts.append(
        "## What each metric does not show\n\n"
        + "\n".join(f"- **{label(name)}**: {metric.note}." for name, metric in METRICS.items())
    )
    parts.append(
        f"{TEST_NOTE} Primary metrics: {', '.join(METRICS[name].title for name in PRIMARY)}. "
        "No expert rated these answers."
    )
    return "\n\n".join(parts) + "\n"


def lead(summary: Mapping[str, Any]) -> str:
    """What was asked."""
    return (
        f"{summary['questions']} held-out questions, {summary['samples_per_question']} answer(s) each, "
        f"{summary['references']} reference answers. Brackets hold 95 % intervals over questions."
    )


def judged_terminal(judged: Mapping[str, Any]) -> str:
    """The text that ends a judging."""
    return "\n\n".join([judged_lead(judged), *(f"! {warning}" for warning in judged["warnings"]),
                        *(text_table(rows) for rows in judged_tables(judged))])  # fmt: skip


def judged_markdown(judged: Mapping[str, Any]) -> str:
    """The section that a judging adds to report.md."""
    parts = [
        f"## Judged by {judged['judge']}",
        judged_lead(judged),
        "\n".join(f"- {warning}" for warning in judged["warnings"]),
        *(markdown_table(rows) for rows in judged_tables(judged)),
        "Criteria:\n\n" + "\n".join(f"- **{name}**: {statement}" for name, statement in RUBRIC.items()),
    ]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def judged_tables(judged: Mapping[str, Any]) -> list[list[list[str]]]:
    """The tables of preference and rubric, and of agreement with people when there are labels."""
    (first, second), shares, criteria = judged["arms"], judged["preference"], judged["rubric"]
    preference = [
        [f"{second} against {first}", "", "questions"],
        *(
            [title, with_interval(shares[key], 3), str(shares[key]["n"]) if shares[key] else ""]
            for title, key in (
                ("win rate (a tie counts one half)", "win_rate"),
                ("same verdict in both orders", "consistency"),
                ("verdicts for the answer shown first (0.5: no position bias)", "first_chosen"),
                ("decided pairs won by the longer answer", "longer_wins"),
                (f"pairs in which {second} is longer", "second_longer"),
            )
        ),
    ]
    changes = {row["criterion"]: row for row in criteria["differences"]}
    rubric = [["criterion", first, second, "difference", "p", "validated"]]
    for name in RUBRIC:
        change = changes.get(name)
        rubric.append(
            [
                f"{name} †" if name in HOLD_FOR_NOISE else name,
                *(with_interval(criteria["arms"][arm][name], 3) for arm in (first, second)),
                with_interval(change, 3, sign="+"),
                p_text(change) if change else "",
                _validated(judged, name),
            ]
        )
    agreement = [
        ["judge and people", "answers", "questions", "equal", "kappa", "alpha", "alpha of people", "validated"]
    ]
    for name, each in judged["agreement"].items():
        numbers = [f"{each[key]:.2f}" if each[key] is not None else "" for key in ("raw", "kappa", "human_alpha")]
        agreement.append(
            [
                name,
                str(each["n"]),
                str(each.get("questions", "")),
                *numbers[:2],
                with_interval(each["alpha"], 2),
                numbers[2],
                _validated(judged, name),
            ]
        )
    return [preference, rubric, *([agreement] if len(agreement) > 1 else [])]


def judged_lead(judged: Mapping[str, Any]) -> str:
    """Who won, in a few sentences, and how it was judged."""
    (first, second), pairs, asked = judged["arms"], judged["preference"], judged["counts"]
    p = "" if pairs["p"] is None else f" (p {'<0.001' if pairs['p'] < 0.001 else format(pairs['p'], '.3f')})"
    return (
        f"{judged['judge']} ({_validated(judged, 'preference')} on preference): {second} against {first} wins "
        f"{pairs['wins']}, ties {pairs['ties']}, loses {pairs['losses']} of {pairs['judged']} pairs{p}. Each pair is "
        f"judged in both orders; verdicts that differ are a tie. {asked['asked']} judgements, {asked['failed']} "
        f"failed, {asked['unreadable']} unreadable. † is also met by text without meaning: read it with coherent."
    )


def _validated(judged: Mapping[str, Any], name: str) -> str:
    return "validated" if judged["agreement"].get(name, {}).get("validated") else "not validated"


def base_of(summary: Mapping[str, Any]) -> str | None:
    """The arm that is the base; None when it was not asked."""
    return next((name for name, arm in summary["arms"].items() if arm["kind"] == "base"), None)


def compared(summary: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Each adapter with its differences from the base; empty without a base."""
    base = base_of(summary)
    if base is None:
        return {}
    return {
        name: [row for row in summary["differences"] if (row["arm"], row["against"]) == (name, base)]
        for name, arm in summary["arms"].items()
        if arm["kind"] == "adapter"
    }


def beside(summary: Mapping[str, Any], adapter: str) -> list[list[str]]:
    """One adapter next to the base: one line per metric."""
    base = str(base_of(summary))
    rows = [["metric", base, adapter, "difference", "p", "human"]]
    for change in compared(summary)[adapter]:
        name, metric = change["metric"], METRICS[change["metric"]]
        human = summary["arms"].get("human", {}).get("metrics", {}).get(name)
        rows.append(
            [
                label(name),
                with_interval(summary["arms"][base]["metrics"].get(name), metric.digits),
                with_interval(summary["arms"][adapter]["metrics"].get(name), metric.digits),
                with_interval(change, metric.digits, sign="+"),
                p_text(change),
                f"{human['value']:.{metric.digits}f}" if human else "",
            ]
        )
    return rows


def label(metric: str) -> str:
    """The title of a metric with an arrow for the better direction."""
    return METRICS[metric].title + _ARROWS[METRICS[metric].better]


def result(change: Mapping[str, Any]) -> str:
    """ "better" or "worse" for a significant difference of a primary metric, else empty."""
    if change["p_holm"] is None or change["p_holm"] >= 0.05:
        return ""
    return "better" if (change["value"] > 0) == (METRICS[change["metric"]].better == "higher") else "worse"


def all_arms(summary: Mapping[str, Any]) -> list[list[str]]:
    """Every arm and yardstick with its main metrics."""
    columns = [*PRIMARY, "question_similarity", "words"]
    rows = [["arm", *(label(name) for name in columns)]]
    for name, arm in summary["arms"].items():
        cells = [arm["metrics"].get(column) for column in columns]
        rows.append(
            [name, *(f"{c['value']:.{METRICS[m].digits}f}" if c else "" for m, c in zip(columns, cells, strict=True))]
        )
    return rows


def by_turn(summary: Mapping[str, Any]) -> list[list[str]]:
    """Bits per byte of held-out conversations: one line per turn; the base, then each arm with its difference."""
    turns, base = summary["turns"], summary["spec"]["base"]
    changes = {(row["arm"], row["turn"]): row for row in turns["differences"]}
    others = [arm for arm in turns["arms"] if arm != base]
    first = [base] if base in turns["arms"] else []
    heading = ["turn", "conversations", *first]
    heading += [cell for arm in others for cell in (arm, *(["difference", "p"] if first else []))]
    names = list(dict.fromkeys(turn for cells in turns["arms"].values() for turn in cells))
    rows = [heading]
    for turn in sorted(names, key=lambda name: int(name) if name.isdigit() else 0):
        cells = [turn, str(max(each[turn]["n"] for each in turns["arms"].values() if turn in each))]
        cells += [with_interval(turns["arms"][arm].get(turn), 3) for arm in first]
        for arm in others:
            cells.append(with_interval(turns["arms"][arm].get(turn), 3))
            if first:
                change = changes.get((arm, turn))
                cells += [with_interval(change, 3, sign="+"), p_text(change) if change else ""]
        rows.append(cells)
    return rows


def turns_note(summary: Mapping[str, Any]) -> str:
    """What `by_turn` shows."""
    return (
        f"{summary['turns']['conversations']} held-out conversations: bits per byte of each reply, given what was "
        "really said before it. Brackets: 95 % intervals over conversations. p: paired permutation test, "
        "Holm-corrected over the turns."
    )


def counts(summary: Mapping[str, Any]) -> list[list[str]]:
    """What was counted for every arm."""
    keys = ("rows", "errors", "empty", "cut", "retries", "tokens")
    rows = [["arm", "answers", "errors", "empty", "cut by length", "retries", "tokens", "distinct-2 of all answers"]]
    for name, arm in summary["arms"].items():
        numbers = ["" if arm["kind"] == "yardstick" else str(arm[key]) for key in keys]
        rows.append([name, *numbers, "" if arm["diversity"] is None else f"{arm['diversity']:.3f}"])
    return rows


def with_interval(cell: Mapping[str, Any] | None, digits: int, sign: str = "") -> str:
    """`0.652 [0.641, 0.663]`; without brackets when there is no interval; empty when there is no value."""
    if cell is None:
        return ""
    value = f"{cell['value']:{sign}.{digits}f}"
    return (
        value if cell["low"] is None else f"{value} [{cell['low']:{sign}.{digits}f}, {cell['high']:{sign}.{digits}f}]"
    )


def p_text(change: Mapping[str, Any]) -> str:
    """The corrected p of a primary metric, with a star below 0.05; any other p in parentheses."""
    p = change["p"] if change["p_holm"] is None else change["p_holm"]
    if p is None:
        return ""
    shown = "<0.001" if p < 0.001 else f"{p:.3f}"
    return f"({shown})" if change["p_holm"] is None else f"{shown}{'*' if p < 0.05 else ''}"
