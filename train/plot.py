"""The pictures that training leaves: the loss curve of a run, and the apparent gain of a leaking split."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from counsel.report.charts import INK, SERIES, head, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GRAY = SERIES[6]


def loss_curve(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the losses of metrics.jsonl rows into a PNG at `path`."""
    picture(lambda axes: draw_losses(axes, rows, title), path, height=5.0)


def draw_losses(axes: "Axes", rows: list[dict[str, Any]], title: str) -> None:
    """Training loss, each step and smoothed, and validation loss, with its first and best value."""
    from matplotlib.ticker import MaxNLocator

    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    checks = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if steps:
        x, y = zip(*steps, strict=True)
        axes.plot(x, y, color=_GRAY, linewidth=0.9, label="training, each step")
        axes.plot(x, smoothed(y), color=INK, linewidth=1.8, label="training, smoothed")
    if checks:
        x, y = zip(*checks, strict=True)
        axes.plot(x, y, color=SERIES[0], linewidth=1.8, marker="o", markersize=5, label="validation")
        best = min(checks, key=lambda check: check[1])
        for check, name in {best: "best", checks[0]: "before"}.items():
            axes.annotate(f"{name} {check[1]:.3f}", check, xytext=(6, 8), textcoords="offset points")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.03, y=0.12)
    head(axes, title, wide=True)


def smoothed(values: tuple[float, ...], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, out = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**count))
    return out


def gains(by_split: dict[str, list[float]], path: Path) -> None:
    """Draw each run's gain over the base (nats per answer token) and the mean, by split, into a PNG at `path`."""
    labels = {"row": "split by row\n(questions leak)", "question": "split by question"}
    colors = {"row": _GRAY, "question": SERIES[0]}

    def draw(axes: "Axes") -> None:
        for place, (split, values) in enumerate(by_split.items()):
            mean = sum(values) / len(values)
            axes.barh(place, mean, color=colors[split], height=0.55)
            axes.plot(values, [place] * len(values), "o", color=INK, markersize=5)
            axes.annotate(f"{mean:.3f}", (max(*values, mean), place), xytext=(8, -3), textcoords="offset points")
        axes.set_yticks(range(len(by_split)), [labels[split] for split in by_split])
        axes.invert_yaxis()
        axes.set_xlabel("gain over the base on held-out answers (nats per token); a dot is one seed")
        axes.set_title("How much of the apparent gain is leakage")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.15)

    picture(draw, path, height=3.4)
