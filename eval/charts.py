"""The forest plot of an evaluation: every difference from the base, with its interval, on one axis."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from counsel.report.charts import BLUE, GREEN, INK, RED, chart, head, label_rows
from eval.metrics import METRICS, PRIMARY
from eval.report import label

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

_NEITHER = "interval includes 0, or no better direction"
_STYLES: dict[str, dict[str, Any]] = {
    "better": {"color": GREEN, "marker": "o"},
    "worse": {"color": RED, "marker": "X"},
    _NEITHER: {"color": BLUE, "marker": "o", "markerfacecolor": "none"},
}


def forest(changes: Sequence[Mapping[str, Any]], arm: str, base: str) -> "Markup | None":
    """The differences of `arm` from `base` in two charts: primary metrics and others; None when none has an interval.

    A difference is drawn in units of its standard deviation over questions (d_z), so that all metrics share an axis,
    which reaches to the farthest bound.
    """
    rows = [row for row in changes if row["d_z"] is not None and row["low"] is not None and row["value"] != 0]
    if not rows:
        return None
    reach = 1.08 * max(0.5, *(abs(_in_deviations(row, bound)) for row in rows for bound in ("low", "high")))
    groups = (
        ("Primary metrics", [row for row in rows if row["metric"] in PRIMARY]),
        ("Other metrics", [row for row in rows if row["metric"] not in PRIMARY]),
    )
    drawings = [_forest(f"{title}: {arm} − {base}", members, reach) for title, members in groups if members]
    return type(drawings[0])("\n").join(drawings)


def _forest(title: str, rows: Sequence[Mapping[str, Any]], reach: float) -> "Markup":
    def draw(axes: "Sequence[Axes]") -> None:
        axis = axes[0]
        drawn: dict[str, Any] = {}
        for place, row in enumerate(rows):
            style = _STYLES[direction(row)]
            low, value, high = (_in_deviations(row, bound) for bound in ("low", "value", "high"))
            axis.plot([low, high], [place, place], color=style["color"], linewidth=2)
            (drawn[direction(row)],) = axis.plot(
                [value], [place], markersize=7, linestyle="none", label=direction(row), **style
            )
        # In pieces, so that the zero line crosses no label.
        axis.vlines([0] * len(rows), [place - 0.22 for place in range(len(rows))],
                    [place + 0.3 for place in range(len(rows))], color=INK, linewidth=1)  # fmt: skip
        axis.set_xlim(-reach, reach)
        axis.set_xlabel("← lower · standard deviations (d_z) · higher →")
        label_rows(axis, [label(row["metric"]) for row in rows])
        head(axis, title, [drawn[name] for name in _STYLES if name in drawn])

    described = "; ".join(
        f"{METRICS[row['metric']].title}: {row['value']:+.3g}, interval {row['low']:+.3g} to {row['high']:+.3g}, "
        f"{direction(row)}"
        for row in rows
    )
    return chart(draw, title=title, description=f"Differences with 95 % intervals. {described}.",
                 height=1.5 + 0.45 * len(rows))  # fmt: skip


def direction(change: Mapping[str, Any]) -> str:
    """Whether the interval of a difference lies on the better or the worse side of zero."""
    better = METRICS[change["metric"]].better
    if not better or change["low"] is None or change["low"] <= 0 <= change["high"]:
        return _NEITHER
    return "better" if (change["value"] > 0) == (better == "higher") else "worse"


def _in_deviations(row: Mapping[str, Any], bound: str) -> float:
    in_deviations: float = row[bound] * row["d_z"] / row["value"]
    return in_deviations
