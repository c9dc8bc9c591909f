"""The findings of dialogues as text and as report.html, where every dialogue can be read."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from counsel.report import page, section
from counsel.report.tables import markdown_table, text_table
from eval.dialogue.findings import DRIFTING, significant
from eval.dialogue.measures import TURN_METRICS
from eval.dialogue.person import TURNS
from eval.report import p_text, with_interval
from eval.samples import Row

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

_NOTE = (
    "Brackets: 95 % intervals over dialogues. p: paired permutation test over dialogues, Holm-corrected over all "
    "metrics, turns and models; * below 0.05. Longer or more similar is not better."
)
_DRIFT_NOTE = (
    f"Turn {TURNS} minus turn 1. The script asks other things at turn {TURNS} than at turn 1, so only the difference "
    "between two models is about the models."
)


def dialogue_finding(summary: Mapping[str, Any]) -> str:
    """Where each model first differs from the base, in one or two sentences per model."""
    sentences = []
    for arm, onset in summary["onset"].items():
        base = summary["spec"]["base"]
        if onset is None:
            sentences.append(f"{arm} differs significantly from {base} at no turn.")
        else:
            at = [row for row in summary["differences"] if (row["arm"], row["turn"]) == (arm, onset)]
            names = "; ".join(TURN_METRICS[row["metric"]].title for row in at if significant(row))
            sentences.append(f"{arm} differs significantly from {base} first at turn {onset} ({names}).")
        drifted = [row for row in summary["drifts"] if row["arm"] == arm and significant(row)]
        if drifted:
            names = "; ".join(f"{TURN_METRICS[row['metric']].title} {_signed(row)}" for row in drifted)
            sentences.append(f"From turn 1 to turn {TURNS} it changes differently: {names}.")
    return " ".join(sentences) or "No model was compared with the base."


def dialogue_text(summary: Mapping[str, Any], markdown: bool = False) -> str:
    """The text for the terminal, or report.md."""
    table, mark = (markdown_table, "## ") if markdown else (text_table, "")
    parts = [f"# Dialogues of {summary['run']}"] if markdown else []
    parts += [_lead(summary), *(f"! {warning}" for warning in dialogue_warnings(summary))]
    for title, cells in _tables(summary):
        parts += [f"{mark}{title}", table(cells)]
    parts += [_NOTE, _DRIFT_NOTE, dialogue_finding(summary)]
    return "\n\n".join(parts) + ("\n" if markdown else "")


def dialogue_page(summary: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The HTML text of the report."""
    notes = [("metric", "what it measures"), *((metric.title, metric.note) for metric in TURN_METRICS.values())]
    tables = _tables(summary)
    spec = json.dumps(summary["spec"], ensure_ascii=False, indent=2)
    return page(
        f"Dialogues of {summary['run']}",
        [
            section("By turn", _chart(summary), note="Means over dialogues, with 95 % intervals."),
            *(section(title, cells, note=_DRIFT_NOTE if title == _DRIFT else _NOTE) for title, cells in tables),
            *_every_dialogue(rows),
            section("How it was measured", notes, note=f"{_lead(summary)} Made {summary['stamp']}."),
            section("Settings, versions and hashes", _preformatted(spec), folded=True),
        ],
        finding=dialogue_finding(summary),
        warnings=dialogue_warnings(summary),
    )


def dialogue_warnings(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing a number."""
    lines = []
    for name, arm in summary["arms"].items():
        if arm["errors"]:
            lines.append(f"{name}: {arm['errors']} of {arm['dialogues']} dialogues failed and are not scored")
        if arm["empty"]:
            lines.append(f"{name}: {arm['empty']} answers have no words; their length is 0, their similarity missing")
        if arm["cut"] > arm["dialogues"] * TURNS / 2:
            lines.append(f"{name}: {arm['cut']} of {arm['dialogues'] * TURNS} answers were cut at max_tokens")
    return lines


_DRIFT = f"From turn 1 to turn {TURNS}"


def _lead(summary: Mapping[str, Any]) -> str:
    config = summary["spec"]["config"]
    player = f"played by {config['person_model']}" if config["person_model"] else "who follows a script"
    return f"{config['dialogues']} dialogues of {TURNS} turns per model, with a person {player}; same seeds for all."


def _tables(summary: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """One table per metric, a line per turn; then the drift."""
    arms, base = summary["arms"], summary["spec"]["base"]
    first = [base] if base in arms else []
    others = [arm for arm in arms if arm != base]
    columns = [*first, *(cell for arm in others for cell in (arm, *(["difference", "p"] if first else [])))]
    changes = {(row["arm"], row["metric"], row["turn"]): row for row in summary["differences"]}
    tables = []
    for name, metric in TURN_METRICS.items():
        rows = [["turn", *columns]]
        for turn in range(1, TURNS + 1):
            cells = [with_interval(arms[arm]["metrics"][name].get(str(turn)), metric.digits) for arm in first]
            for arm in others:
                cells.append(with_interval(arms[arm]["metrics"][name].get(str(turn)), metric.digits))
                cells += _change_cells(changes.get((arm, name, turn)), metric.digits) if first else []
            if any(cells):
                rows.append([str(turn), *cells])
        tables.append((metric.title, rows))
    drifts = {(row["arm"], row["metric"]): row for row in summary["drifts"]}
    rows = [["metric", *columns]]
    for name in DRIFTING:
        digits = TURN_METRICS[name].digits
        cells = [with_interval(arms[arm]["drift"].get(name), digits, sign="+") for arm in first]
        for arm in others:
            cells.append(with_interval(arms[arm]["drift"].get(name), digits, sign="+"))
            cells += _change_cells(drifts.get((arm, name)), digits) if first else []
        rows.append([TURN_METRICS[name].title, *cells])
    return [*tables, (_DRIFT, rows)]


def _change_cells(change: Mapping[str, Any] | None, digits: int) -> list[str]:
    return [with_interval(change, digits, sign="+"), p_text(change) if change else ""]


def _signed(row: Mapping[str, Any]) -> str:
    return f"{row['value']:+.{TURN_METRICS[row['metric']].digits}f}"


def _chart(summary: Mapping[str, Any]) -> "Markup":
    from counsel.report.charts import MARKERS, SERIES, chart, head

    arms = summary["arms"]

    def draw(axes: "Sequence[Axes]") -> None:
        for panel, (axis, name) in enumerate(zip(axes, DRIFTING, strict=True)):
            for place, arm in enumerate(arms):
                cells = {int(turn): cell for turn, cell in arms[arm]["metrics"][name].items()}
                style: dict[str, Any] = {"color": SERIES[place % len(SERIES)], "marker": MARKERS[place % len(MARKERS)]}
                axis.plot(list(cells), [cell["value"] for cell in cells.values()], label=arm, **style)
                bounded = {turn: cell for turn, cell in cells.items() if cell["low"] is not None}
                axis.vlines(list(bounded), [cell["low"] for cell in bounded.values()],
                            [cell["high"] for cell in bounded.values()], color=style["color"], linewidth=1)  # fmt: skip
            head(axis, TURN_METRICS[name].title, None if panel == 0 else [], wide=True)
        axes[-1].set_xlabel("turn")

    described = "; ".join(
        f"{arm}, {TURN_METRICS[name].title}: "
        + ", ".join(f"{cell['value']:.{TURN_METRICS[name].digits}f}" for cell in each["metrics"][name].values())
        for arm, each in arms.items()
        for name in DRIFTING
    )
    return chart(
        draw,
        title="By turn",
        description=f"Means by turn. {described}.",
        height=2.4 * len(DRIFTING),
        wide=True,
        panels=len(DRIFTING),
    )


def _every_dialogue(rows: Sequence[Row]) -> "list[Markup]":
    """Each dialogue as a folded table: a line per turn, the models side by side."""
    from markupsafe import Markup

    cell = Markup('<p class="soft">{}</p><p>{}</p>')
    sections = []
    for key in dict.fromkeys((row["persona"], row["dialogue"]) for row in rows):
        talks = [row for row in rows if (row["persona"], row["dialogue"]) == key]
        lines: list[list[str]] = [["turn", *(row["arm"] for row in talks)]]
        for turn in range(max(len(row["turns"]) for row in talks)):
            lines.append([str(turn + 1)])
            for row in talks:
                spoken = row["turns"][turn] if turn < len(row["turns"]) else None
                lines[-1].append(cell.format(spoken["person"], spoken["error"] or spoken["text"]) if spoken else "")
        failed = "; ".join(f"{row['arm']} ended at {row['error']}" for row in talks if row["error"])
        note = f"Fact: {talks[0]['fact']}. Small letters: the person. {failed}"
        sections.append(section(f"Dialogue {key[1] + 1} with {key[0]}", lines, note=note.strip(), folded=True))
    return sections


def _preformatted(text: str) -> "Markup":
    from markupsafe import Markup

    return Markup("<pre>{}</pre>").format(text)
