"""The report's charts: each a function from figures to the text of an inline SVG."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loadtest.records import FAILED, RequestRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0f4c5c", "#e36414", "#6a994e", "#9a031e", "#5f0f40", "#3a86ff", "#bc6c25", "#6c757d")


def timeline(rows: Sequence[RequestRecord], samples: Sequence[Mapping[str, Any]], warmup_s: float) -> str:
    """Latency of each request when it was due, what the client had in flight, and what the server says of itself."""
    models = sorted({row.model for row in rows})
    with_server = any("running" in sample for sample in samples)

    def draw(axes: "Sequence[Axes]") -> None:
        for index, model in enumerate(models):
            shown = [row for row in rows if row.model == model and row.ok]
            # Points, not vectors: ten thousand circles would make a page of megabytes.
            axes[0].scatter([row.due_s for row in shown], [row.ttft_s or 0.0 for row in shown], s=9, alpha=0.7,
                            color=_COLOURS[index % len(_COLOURS)], label=model, rasterized=True)  # fmt: skip
        failed = [row for row in rows if row.outcome in FAILED]
        axes[0].scatter([row.due_s for row in failed], [0] * len(failed), marker="x", s=20, color="#d00000",
                        label=f"failed ({len(failed)})" if failed else None)  # fmt: skip
        axes[0].set_ylabel("TTFT (s)")
        if rows:
            axes[0].legend(loc="upper left", fontsize=7, ncols=4, frameon=False)
        edges, counts, tokens = per_second(rows)
        axes[1].plot(edges, tokens, color=_COLOURS[0], label="output tokens/s")
        axes[1].set_ylabel("tokens/s")
        beside = axes[1].twinx()
        beside.plot(edges, counts, color=_COLOURS[1], label="in flight (client)")
        if with_server:
            _line(beside, samples, "waiting", "waiting (server)", _COLOURS[3])
        beside.set_ylabel("requests")
        lines = [*axes[1].get_lines(), *beside.get_lines()]
        names = [str(line.get_label()) for line in lines]
        axes[1].legend(lines, names, loc="upper left", fontsize=7, ncols=3, frameon=False)
        if with_server:
            _line(axes[2], samples, "kv_used", "KV cache used (%)", _COLOURS[2], scale=100)
            _line(axes[2], samples, "loads", "adapter loads so far", _COLOURS[4], from_first=True)
            _line(axes[2], samples, "preemptions", "preemptions so far", _COLOURS[3], from_first=True)
            axes[2].legend(loc="upper left", fontsize=7, ncols=3, frameon=False)
        if warmup_s:
            for axis in axes:
                axis.axvspan(0, warmup_s, color="#000000", alpha=0.06)
        axes[-1].set_xlabel("seconds after the start" + (" (grey: warm-up)" if warmup_s else ""))

    return _svg(draw, panels=3 if with_server else 2, size=(9, 7 if with_server else 5))


def latencies(models: Mapping[str, Mapping[str, Any]]) -> str:
    """TTFT and TPOT of each model side by side: median as a bar, 90th percentile as a line above it."""
    names = list(models)

    def draw(axes: "Sequence[Axes]") -> None:
        for axis, key, label in ((axes[0], "ttft_s", "TTFT (ms)"), (axes[1], "tpot_s", "TPOT (ms)")):
            for index, name in enumerate(names):
                p50, p90 = models[name][key]["p50"], models[name][key]["p90"]
                if p50 is not None:
                    axis.bar(index, 1000 * p50, color=_COLOURS[index % len(_COLOURS)], width=0.6)
                    axis.plot([index, index], [1000 * p50, 1000 * p90], color="#222222", linewidth=1.5)
            axis.set_ylabel(label)
            axis.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)

    return _svg(draw, panels=2, size=(9, 3.2), across=True)


def curves(points: Sequence[Mapping[str, Any]]) -> str:
    """Against the offered rate: TTFT, the rate achieved, share of good requests; and system against user speed.

    `points`, ascending by rate: offered, achieved (requests/s), ttft_p50_s, ttft_p90_s, tpot_p50_s, tokens_per_s,
    goodput_share; None where nothing came back.
    """
    offered = [point["offered"] for point in points]

    def draw(axes: "Sequence[Axes]") -> None:
        for key, label, colour in (("ttft_p50_s", "TTFT p50", _COLOURS[0]), ("ttft_p90_s", "TTFT p90", _COLOURS[1])):
            axes[0].plot(offered, [point[key] for point in points], "o-", color=colour, label=label)
        axes[0].set_ylabel("seconds")
        axes[1].plot(offered, offered, color="#999999", linestyle=":", label="offered")
        axes[1].plot(offered, [point["achieved"] for point in points], "o-", color=_COLOURS[0], label="achieved")
        axes[1].set_ylabel("requests/s")
        axes[2].plot(offered, [point["goodput_share"] for point in points], "o-", color=_COLOURS[2], label="good")
        axes[2].set_ylim(-0.03, 1.03)
        axes[2].set_ylabel("share of requests")
        for axis in axes[:3]:
            axis.set_xlabel("offered requests/s")
            axis.legend(fontsize=7, frameon=False)
        known = [point for point in points if point["tpot_p50_s"]]
        axes[3].plot([1 / point["tpot_p50_s"] for point in known], [point["tokens_per_s"] for point in known], "o-",
                     color=_COLOURS[4])  # fmt: skip
        for point in known:
            axes[3].annotate(f"{point['offered']:.3g}/s", (1 / point["tpot_p50_s"], point["tokens_per_s"]), fontsize=7)
        axes[3].set_xlabel("tokens/s each user sees (1 / median TPOT)")
        axes[3].set_ylabel("tokens/s of the system")

    return _svg(draw, panels=4, size=(9, 6), across=True)


def per_second(rows: Sequence[RequestRecord]) -> tuple[list[int], list[int], list[float]]:
    """For each second: its start, requests in flight at it, and output tokens in it (spread over their chunks)."""
    sent = [row for row in rows if row.sent_s is not None and row.end_s is not None]
    n = int(max((row.end_s or 0.0 for row in sent), default=0.0)) + 1
    tokens, change = [0.0] * n, [0] * (n + 1)
    for row in sent:
        change[max(int(row.sent_s or 0.0), 0)] += 1
        change[int(row.end_s or 0.0) + 1] -= 1
        if row.first_s is None or not row.completion_tokens:
            continue
        each, at = row.completion_tokens / (len(row.gaps_s) + 1), row.first_s
        tokens[min(int(at), n - 1)] += each
        for gap in row.gaps_s:
            at += gap
            tokens[min(int(at), n - 1)] += each
    counts, running = [], 0
    for step in change[:n]:
        running += step
        counts.append(running)
    return list(range(n)), counts, tokens


def _line(axis: "Axes", samples: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, *,
          scale: float = 1.0, from_first: bool = False) -> None:  # fmt: skip
    """Draw one figure of the server over time, where it has it; `from_first` shows its growth."""
    known = [sample for sample in samples if key in sample]
    if known:
        first = known[0][key] if from_first else 0.0
        values = [scale * (sample[key] - first) for sample in known]
        axis.step([sample["t_s"] for sample in known], values, where="post", color=colour, label=label)


def _svg(
    draw: "Callable[[Sequence[Axes]], None]", panels: int, size: tuple[float, float], *, across: bool = False
) -> str:
    """An SVG of `panels` axes, one below the other, or across (two in a row)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    style: Any = {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        rows, columns = (-(-panels // 2), 2) if across else (panels, 1)
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharex=not across, dpi=110)
        draw(list(axes.flat))
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg")
        pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
