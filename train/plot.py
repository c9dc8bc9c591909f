"""The loss curve of a run as a picture."""

from pathlib import Path
from typing import Any

INK, SOFT, ACCENT, GRID = "#1f2933", "#9fb3c8", "#0b7285", "#e4e7eb"


def loss_curve(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw training loss (each step, and smoothed) and validation loss of metrics.jsonl rows into a PNG at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    checks = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    figure, axes = pyplot.subplots(figsize=(7.2, 4.0), dpi=160, layout="constrained")
    if steps:
        x, y = zip(*steps, strict=True)
        axes.plot(x, y, color=SOFT, linewidth=0.9, label="training, each step")
        axes.plot(x, smoothed(y), color=INK, linewidth=1.8, label="training, smoothed")
    if checks:
        x, y = zip(*checks, strict=True)
        axes.plot(x, y, color=ACCENT, linewidth=1.8, marker="o", markersize=5, label="validation")
        best = min(checks, key=lambda point: point[1])
        for index, (point, where) in enumerate(((checks[0], "before"), (best, "best"))):
            if index == 0 or point != checks[0]:
                axes.annotate(
                    f"{where} {point[1]:.3f}",
                    point,
                    xytext=(6, 8),
                    textcoords="offset points",
                    color=ACCENT,
                    fontsize=9,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
                )
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.03, y=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
    pyplot.close(figure)


def smoothed(values: tuple[float, ...], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, out = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**count))
    return out


def gains(by_split: dict[str, list[float]], path: Path) -> None:
    """Draw the gain over the base (nats per answer token) of each run, and the mean, by split into a PNG at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 2.6), dpi=160, layout="constrained")
    for place, (split, values) in enumerate(by_split.items()):
        color = {"row": SOFT, "question": ACCENT}[split]
        mean = sum(values) / len(values)
        axes.barh(place, mean, color=color, height=0.55)
        axes.plot(values, [place] * len(values), "o", color=INK, markersize=5)
        axes.annotate(f"{mean:.3f}", (max(*values, mean), place), xytext=(8, -3), textcoords="offset points", color=INK)
    labels = {"row": "split by row\n(questions leak)", "question": "split by question"}
    axes.set_yticks(range(len(by_split)), [labels[split] for split in by_split])
    axes.invert_yaxis()
    axes.set_xlabel("gain over the base on held-out answers (nats per token); a dot is one seed")
    axes.set_title("How much of the apparent gain is leak", loc="left", fontsize=11, color=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.15)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)
