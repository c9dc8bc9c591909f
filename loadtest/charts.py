"""The load test's charts, each as inline SVG."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from counsel.report.charts import INK, MARKERS, RED, SERIES, chart, head, label_rows
from loadtest.records import FAILED, RequestRecord

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes


def timeline(rows: Sequence[RequestRecord], samples: Sequence[Mapping[str, Any]], warmup_s: float) -> "Markup":
    """Each request's TTFT by the second it was due, the client's load, and the server's own metrics."""
    models = sorted({row.model for row in rows})
    failed = [row for row in rows if row.outcome in FAILED]
    with_server = any("running" in sample for sample in samples)

    def draw(axes: "Sequence[Axes]") -> None:
        _draw_requests(axes[0], rows, models, failed)
        _draw_load(axes[1], rows, samples if with_server else ())
        if with_server:
            _draw_server_line(axes[2], samples, "kv_used", "KV cache used (%)", SERIES[2], scale=100)
            _draw_server_line(axes[2], samples, "loads", "adapter loads", SERIES[4], from_first=True)
            _draw_server_line(axes[2], samples, "preemptions", "preemptions", SERIES[3], from_first=True)
            head(axes[2], "The server's own metrics (loads and preemptions: since the start)", wide=True)
        if warmup_s:
            for axis in axes:
                axis.axvspan(0, warmup_s, color=INK, alpha=0.08, linewidth=0)
        axes[-1].set_xlabel("seconds since the start" + (" (gray: warm-up)" if warmup_s else ""))

    return chart(
        draw,
        title="Timeline of the run",
        description=f"Time to first token of {len(rows)} requests by the second each was due, {len(failed)} of them "
        "failed; output tokens per second and requests in flight"
        + ("; use of the server's KV cache, adapter loads and preemptions." if with_server else "."),
        height=7.5 if with_server else 5.4,
        wide=True,
        panels=3 if with_server else 2,
    )


def latencies(models: Mapping[str, Mapping[str, Any]]) -> "Markup":
    """TTFT and TPOT of each model: a bar to the median, a line on to the 90th percentile."""
    return _side_by_side(
        _latency(models, "ttft_s", "Time to first token (ms)"),
        _latency(models, "tpot_s", "Time per output token (ms)"),
    )


def curves(points: Sequence[Mapping[str, Any]]) -> "Markup":
    """Against the offered rate: TTFT, achieved rate and goodput; and the system's speed against each user's.

    `points`, ascending by rate: offered, achieved (requests/s), ttft_p50_s, ttft_p90_s, tpot_p50_s, tokens_per_s,
    goodput_share; None where there is no value.
    """
    offered = [point["offered"] for point in points]

    def against_rate(title: str, *lines: tuple[str, str, str]) -> "Markup":
        def draw(axes: "Sequence[Axes]") -> None:
            for key, label, color in lines:
                style = ":" if key == "offered" else "o-"
                axes[0].plot(offered, [point[key] for point in points], style, color=color, label=label)
            axes[0].set_ylim(0, 1.05 * axes[0].get_ylim()[1])
            axes[0].set_xlabel("offered requests/s")
            head(axes[0], title, None if len(lines) > 1 else ())

        described = "; ".join(
            f"{label}: " + ", ".join(f"{_short(point[key])} at {_short(point['offered'])}/s" for point in points)
            for key, label, _ in lines
            if key != "offered"
        )
        return chart(draw, title=title, description=f"{described}.", height=3.2)

    return _side_by_side(
        against_rate("Time to first token (s)", ("ttft_p50_s", "p50", SERIES[0]), ("ttft_p90_s", "p90", SERIES[1])),
        against_rate("Completed requests/s", ("offered", "offered", INK), ("achieved", "achieved", SERIES[0])),
        against_rate("Share of requests that count as goodput", ("goodput_share", "goodput", SERIES[2])),
        _speeds([point for point in points if point["tpot_p50_s"]]),
    )


def per_second(rows: Sequence[RequestRecord]) -> tuple[list[int], list[int], list[float]]:
    """For each second: its start, requests in flight in it, and output tokens in it (spread over their chunks)."""
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


def _draw_requests(
    axis: "Axes", rows: Sequence[RequestRecord], models: Sequence[str], failed: Sequence[RequestRecord]
) -> None:
    # More models than colors would make the legend ambiguous: then all are drawn alike.
    groups = {model: {model} for model in models} if len(models) <= len(SERIES) else {f"{len(models)} models": models}
    for (label, members), color, marker in zip(groups.items(), SERIES, MARKERS, strict=False):
        shown = [row for row in rows if row.model in members and row.ok]
        # Pixels, not vectors: ten thousand circles would make a page of megabytes.
        axis.scatter([row.due_s for row in shown], [row.ttft_s or 0.0 for row in shown], s=16, alpha=0.8,
                     linewidths=0, color=color, marker=marker, label=label, rasterized=True)  # fmt: skip
    if failed:
        axis.scatter([row.due_s for row in failed], [0] * len(failed), marker="x", s=28, color=RED,
                     label=f"failed ({len(failed)})")  # fmt: skip
    axis.set_ylim(bottom=0)
    axis.set_ylabel("seconds")
    head(axis, "Time to first token of each request, by when it was due", wide=True)


def _draw_load(axis: "Axes", rows: Sequence[RequestRecord], samples: Sequence[Mapping[str, Any]]) -> None:
    seconds, counts, tokens = per_second(rows)
    axis.plot(seconds, tokens, color=SERIES[0], label="output tokens/s (left)")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens/s")
    beside = axis.twinx()
    beside.grid(visible=False)
    beside.plot(seconds, counts, color=SERIES[1], linestyle="--", label="in flight (right)")
    _draw_server_line(beside, samples, "waiting", "waiting in the server (right)", SERIES[3])
    beside.set_ylim(bottom=0)
    beside.set_ylabel("requests")
    beside.spines["right"].set_visible(True)
    head(axis, "Output and load", [*axis.get_lines(), *beside.get_lines()], wide=True)


def _draw_server_line(axis: "Axes", samples: Sequence[Mapping[str, Any]], key: str, label: str, color: str, *,
                      scale: float = 1.0, from_first: bool = False) -> None:  # fmt: skip
    """Draw one metric of the server over time, if it has any; `from_first` shows its growth."""
    known = [sample for sample in samples if key in sample]
    if known:
        first = known[0][key] if from_first else 0.0
        values = [scale * (sample[key] - first) for sample in known]
        axis.step([sample["t_s"] for sample in known], values, where="post", color=color, label=label)


def _latency(models: Mapping[str, Mapping[str, Any]], key: str, title: str) -> "Markup":
    known = {name: figures[key] for name, figures in models.items() if figures[key]["p50"] is not None}

    def draw(axes: "Sequence[Axes]") -> None:
        for row, spread in enumerate(known.values()):
            color = SERIES[row % len(SERIES)] if len(known) <= len(SERIES) else SERIES[0]
            axes[0].barh(row, 1000 * spread["p50"], color=color, height=0.4)
            axes[0].plot([1000 * spread["p50"], 1000 * spread["p90"]], [row, row], color=INK, linewidth=1.5)
        axes[0].set_xlim(left=0)
        axes[0].set_title(title)
        label_rows(axes[0], list(known))

    described = "; ".join(
        f"{name}: median {1000 * spread['p50']:.1f}, p90 {1000 * spread['p90']:.1f}" for name, spread in known.items()
    )
    return chart(draw, title=title, description=described or "No values.", height=0.8 + 0.45 * max(len(known), 1))


def _speeds(points: Sequence[Mapping[str, Any]]) -> "Markup":
    title = "The system's tokens/s against each user's"

    def draw(axes: "Sequence[Axes]") -> None:
        user = [1 / point["tpot_p50_s"] for point in points]
        axes[0].plot(user, [point["tokens_per_s"] for point in points], "o-", color=SERIES[4])
        for at, point in zip(user, points, strict=True):
            axes[0].annotate(f"{point['offered']:.3g}/s", (at, point["tokens_per_s"]), xytext=(4, 4),
                             textcoords="offset points")  # fmt: skip
        axes[0].margins(0.15)
        axes[0].set_xlabel("tokens/s of one user (1 / median TPOT)")
        axes[0].set_title(title)

    described = "; ".join(
        f"{_short(point['tokens_per_s'])} and {_short(1 / point['tpot_p50_s'])} at {_short(point['offered'])}/s"
        for point in points
    )
    return chart(draw, title=title, description=f"{described}.", height=3.2)


def _side_by_side(*drawings: "Markup") -> "Markup":
    return type(drawings[0])("\n").join(drawings)


def _short(value: float | None) -> str:
    return "no value" if value is None else f"{value:.3g}"
