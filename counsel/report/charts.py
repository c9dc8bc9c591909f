"""Charts as inline SVG that work on a light and on a dark page, and that a screen reader can describe.

Text, axes and grid take the page's own color (`currentColor`). The colors of series are the same in both modes: each
has a contrast of at least 3:1 with either background.
"""

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

SERIES = ("#2c7fb8", "#cb6318", "#2f8f6b", "#b5519c", "#8a6fd1", "#8c7a2b", "#6f7f87")
MARKERS = "os^Dv*P"
RED, GREEN, BLUE = "#d1495b", "#2f8f6b", "#2c7fb8"
# Placeholder for the page's text color while matplotlib draws.
INK = "#010203"
# Inches. An SVG unit is 1/72 inch: with these widths and letters of 12 units, style.css keeps letters at 12 px or more.
WIDE, NARROW = 9.5, 4.88
_LETTERS = 12
_STYLE: Any = {
    "svg.fonttype": "none",
    # A model's name may hold a dollar sign.
    "text.parse_math": False,
    "font.size": _LETTERS,
    "font.family": "sans-serif",
    "axes.titlesize": _LETTERS,
    "axes.labelsize": _LETTERS,
    "xtick.labelsize": _LETTERS,
    "ytick.labelsize": _LETTERS,
    "legend.fontsize": _LETTERS,
    "legend.frameon": False,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color",
         "grid.color"),
        INK,
    ),
}  # fmt: skip


def chart(
    draw: "Callable[[Sequence[Axes]], None]",
    *,
    title: str,
    description: str,
    height: float,
    wide: bool = False,
    panels: int = 1,
) -> "Markup":
    """An inline SVG of what `draw` puts on `panels` axes, stacked vertically; `height` in inches.

    Two charts on one page need different titles or descriptions: ids are derived from them.
    """
    import matplotlib

    matplotlib.use("agg")
    from markupsafe import Markup
    from matplotlib import pyplot

    key = "c" + hashlib.sha256(f"{title}\0{description}".encode()).hexdigest()[:12]
    with pyplot.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure, axes = pyplot.subplots(
            panels, 1, figsize=(WIDE if wide else NARROW, height), squeeze=False, sharex=True, layout="constrained"
        )
        draw(list(axes.flat))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, dpi=144, metadata={"Date": None})
        pyplot.close(figure)
    opening, drawing = text.getvalue().split("<svg ", 1)[1].split(">", 1)
    box = re.findall(r'viewBox="([^"]*)"', opening)[0]
    # A style inside an SVG would hold for the whole page.
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace(INK, "currentColor")
    # matplotlib numbers these ids from 1 in each drawing, and nothing refers to them.
    drawing = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", drawing)
    return Markup(
        '<svg class="{size}" role="img" aria-labelledby="{key}-t {key}-d" viewBox="{box}">'
        '<title id="{key}-t">{title}</title><desc id="{key}-d">{description}</desc>{drawing}'
    ).format(
        size="wide" if wide else "narrow",
        key=key,
        box=box,
        title=title,
        description=description,
        drawing=Markup(drawing),
    )


def label_rows(axes: "Axes", labels: Sequence[str]) -> None:
    """Horizontal rows at y = 0, 1, ... from the top, each with its label above it: long names fit a narrow screen."""
    axes.set_ylim(len(labels) - 0.4, -0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    for row, label in enumerate(labels):
        axes.text(0, row - 0.28, label, transform=axes.get_yaxis_transform(), va="bottom")


def head(axes: "Axes", title: str, lines: Sequence[Any] | None = None, *, wide: bool = False) -> None:
    """The title with the legend below it, both above the plot, where they hide no data."""
    handles = axes.get_legend_handles_labels()[0] if lines is None else lines
    names = [str(handle.get_label()) for handle in handles]
    if not names:
        axes.set_title(title)
        return
    columns = max(1, min(len(names), (92 if wide else 44) // (max(map(len, names)) + 5)))
    axes.legend(handles, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, columnspacing=1.2,
                handlelength=1.4, borderpad=0, borderaxespad=0.4)  # fmt: skip
    axes.set_title(title, pad=8 + 18 * -(-len(names) // columns))


def picture(draw: "Callable[[Axes], None]", path: Path, *, height: float) -> None:
    """Write what `draw` puts on one axis as a PNG on white, in the style of the pages."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDE, height), dpi=120, layout="constrained")
        draw(axes)
        figure.savefig(path)
        pyplot.close(figure)
