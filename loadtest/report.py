"""report.html: the whole run on one page that needs nothing else, made from the files of the results directory."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from counsel.files import write_text
from loadtest.charts import curves, latencies, timeline
from loadtest.results import Results
from loadtest.scenario import Scenario
from loadtest.table import model_cells, objective_cells

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1e; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem }
.verdict { display: inline-block; padding: .15rem .7rem; border-radius: .3rem; color: #fff; font-weight: 600 }
.passed { background: #386641 } .missed { background: #9a031e } .invalid { background: #5c3d00 }
.unjudged { background: #495057 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem }
td, th { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5 }
td:first-child, th:first-child { text-align: left } .scroll { overflow-x: auto }
.pairs td { overflow-wrap: anywhere }
/* Letters of a chart shrink with it: below this it is scrolled instead, within its own frame. */
svg { width: 100%; min-width: 40rem; height: auto } p.note { color: #555; font-size: .87rem } code { font-size: .85em }
"""


def write_report(results: Results, summary: Mapping[str, Any]) -> Path:
    """Write the page of one run; return its path."""
    scenario = results.scenario
    sections = [
        _head(scenario, summary),
        *([section("Objectives", objective_cells(summary))] if summary["slo"] else []),
        section("Models", model_cells(summary), _MODELS_NOTE),
        section("Latency per model", latencies(summary["models"]), "Bar: median. Line: up to the 90th percentile."),
        section("Timeline", timeline(results.records, results.server_samples, scenario.warmup_s)),
        *_curve(summary.get("steps", [])),
        *_cold(summary["cold"]),
        section("Due and sent", _due_cells(summary), _DUE_NOTE),
        section("Outcomes", [("outcome", "n"), *_pairs(summary["all"]["outcomes"])]),
        section("Server", [("figure", "value"), *_pairs(summary["server"])]),
        section("Client", _check_cells(summary), "A run whose client breaks one of these is not believed."),
        section("Scenario", [("option", "value"), *_pairs(scenario.to_json())]),
        section("Made by", [("what", "value"), *_pairs(results.target)]),
    ]
    path = results.directory / "report.html"
    write_text(path, page("Load test", sections))
    return path


def page(title: str, sections: Sequence[str]) -> str:
    """A whole HTML page."""
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>\n<body>{body}</body></html>\n'
    )


_MODELS_NOTE = (
    "Times in ms from sending, of whole replies whose client was to stay. n: requests due after the warm-up. Rates: "
    "what ended between the moment the server was filled and the last arrivals' quickest replies, over that time."
)
_DUE_NOTE = (
    "Someone who wanted to ask at the moment a request was due waited from then; the server is only answerable from "
    "sending. The difference is the client's own delay."
)


def _head(scenario: Scenario, summary: Mapping[str, Any]) -> str:
    load = f"{scenario.concurrency} clients in a closed loop" if scenario.closed else f"{scenario.arrivals} arrivals"
    rate = "" if scenario.closed or scenario.trace else f", {scenario.rate} requests/s"
    found = summary["all"]
    reasons = "".join(f"<p>Not to be believed: {html.escape(reason)}.</p>" for reason in summary["invalid"])
    return (
        f'<h1>Load test <span class="verdict {summary["verdict"]}">{summary["verdict"]}</span></h1>'
        f"<p>{load}{html.escape(rate)} for {scenario.duration_s:g} s, mix {html.escape(scenario.mix)}, to "
        f"<code>{html.escape(scenario.url)}</code>: {found['n']} requests, {found['errors']} failed.</p>{reasons}"
    )


def section(title: str, content: str | Sequence[Sequence[str]], note: str = "") -> str:
    """A headed part of a page: ready HTML, or cells that become a table, and a note below."""
    content = f'<div class="scroll">{content}</div>' if isinstance(content, str) else _table(content)
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<h2>{html.escape(title)}</h2>{content}{below}"


def _table(cells: Sequence[Sequence[str]]) -> str:
    """The first line as head; every cell escaped."""
    head, *lines = cells
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    kind = ' class="pairs"' if len(head) == 2 else ""
    return f'<div class="scroll"><table{kind}><tr>{top}</tr>{rows}</table></div>'


def _pairs(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each key with its value in words; mappings inside are spelled out."""
    pairs = []
    for key, value in document.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
        elif isinstance(value, list | tuple):
            value = " ".join(map(str, value))
        pairs.append((str(key), _plain(value)))
    return pairs


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_cells(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("property", "value", "must be", "")]
    for check in summary["checks"]:
        bound = f"{check['sign']} {check['bound']:.4g}"
        lines.append((check["name"], f"{check['value']:.4g}", bound, "kept" if check["held"] else "BROKEN"))
    return lines


def _due_cells(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("ms", "p50", "p90", "p95", "p99")]
    names = {"ttft_s": "TTFT from sending", "ttft_due_s": "TTFT from being due", "e2e_s": "whole reply from sending",
             "e2e_due_s": "whole reply from being due", "lag_s": "sending after being due"}  # fmt: skip
    for key, name in names.items():
        spread = summary["all"][key]
        values = (spread[percentile] for percentile in ("p50", "p90", "p95", "p99"))
        lines.append((name, *("-" if value is None else f"{1000 * value:.1f}" for value in values)))
    return lines


def _cold(cold: Mapping[str, Any]) -> list[str]:
    """What a request to an adapter pays when it is the first to name it, or the first in a long while."""
    if not cold["cold"]["n"] or not cold["warm"]["n"]:
        return []
    lines = [("adapter requests", "n", "TTFT p50 (ms)", "TTFT p90 (ms)")]
    for name, label in (("cold", "first of its adapter, or sent to the coldest"), ("warm", "all others")):
        spread = cold[name]
        lines.append((label, str(spread["n"]), f"{1000 * spread['p50']:.1f}", f"{1000 * spread['p90']:.1f}"))
    return [section("Cold adapters", lines)]


def _curve(points: Sequence[Mapping[str, Any]]) -> list[str]:
    return [section("Against the offered rate", curves(points))] if len(points) > 1 else []
