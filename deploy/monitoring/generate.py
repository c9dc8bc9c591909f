"""Writes the Prometheus rules and the Grafana dashboard from two lists: `python deploy/monitoring/generate.py`.

A test writes them again, and looks each metric up in a live scrape.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FOLDER = Path(__file__).parent
RULES, DASHBOARD = FOLDER / "counsel.rules.yaml", FOLDER / "counsel-dashboard.json"
RUNBOOK = "docs/deploy.md, Alerts"


class Panel(NamedTuple):
    """One graph. expressions: PromQL by legend. unit: Grafana's name of it."""

    title: str
    unit: str
    expressions: dict[str, str]


class Alert(NamedTuple):
    """One rule. holds: how long the expression must be true. meaning: what a person reads first."""

    name: str
    expression: str
    holds: str
    severity: str
    meaning: str


def _quantile(q: float, histogram: str, by: str = "le") -> str:
    return f"histogram_quantile({q}, sum by ({by}) (rate({histogram}_bucket[5m])))"


PANELS = (
    Panel(
        "Requests",
        "reqps",
        {"{{adapter}} {{status}}": "sum by (adapter, status) (rate(counsel_requests_total[5m]))"},
    ),
    Panel("Refused at the gateway", "reqps", {"{{code}}": "sum by (code) (rate(counsel_refusals_total[5m]))"}),
    Panel(
        "Time to first token",
        "s",
        {f"p{int(q * 100)}": _quantile(q, "counsel_ttft_seconds") for q in (0.5, 0.95, 0.99)},
    ),
    Panel(
        "Time to first token, p95 by adapter",
        "s",
        {"{{adapter}}": _quantile(0.95, "counsel_ttft_seconds", "le, adapter")},
    ),
    Panel(
        "Time per output token",
        "s",
        {f"p{int(q * 100)}": _quantile(q, "counsel_time_per_output_token_seconds") for q in (0.5, 0.95)},
    ),
    Panel(
        "Tokens",
        "short",
        {
            "read": "sum(rate(counsel_prompt_tokens_total[5m]))",
            "generated": "sum(rate(counsel_completion_tokens_total[5m]))",
        },
    ),
    Panel(
        "Requests in the engine",
        "short",
        {
            "admitted {{instance}}": "counsel_sequences_in_flight",
            "running {{instance}}": "vllm:num_requests_running",
            "waiting {{instance}}": "vllm:num_requests_waiting",
        },
    ),
    Panel("KV cache in use", "percentunit", {"{{instance}}": "vllm:kv_cache_usage_perc"}),
    Panel("Adapters in the engine", "short", {"{{instance}}": "count by (instance) (counsel_adapter_resident)"}),
    Panel(
        "Adapter events",
        "cpm",
        {"{{event}}": "60 * sum by (event) (rate(counsel_adapter_events_total[5m]))"},
    ),
    Panel("Adapter load, p95", "s", {"p95": _quantile(0.95, "counsel_adapter_load_seconds")}),
)

ALERTS = (
    Alert(
        "CounselReplicaDown", 'up{job="counsel"} == 0', "2m", "page", "{{ $labels.instance }} does not answer /metrics."
    ),
    Alert(
        "CounselErrors",
        'sum(rate(counsel_requests_total{status=~"5.."}[5m])) / sum(rate(counsel_requests_total[5m])) > 0.02',
        "5m",
        "page",
        "{{ $value | humanizePercentage }} of the requests end in a server error.",
    ),
    Alert(
        "CounselRefusesWork",
        'sum(rate(counsel_refusals_total{status=~"429|503"}[5m])) > 0',
        "10m",
        "ticket",
        "Requests are refused because a queue is full: {{ $value | humanize }} a second.",
    ),
    Alert(
        "CounselSlowFirstToken",
        f"{_quantile(0.95, 'counsel_ttft_seconds')} > 5",
        "10m",
        "ticket",
        "One request of twenty waits {{ $value | humanizeDuration }} for its first token.",
    ),
    Alert(
        "CounselKvCacheFull",
        "vllm:kv_cache_usage_perc > 0.95",
        "10m",
        "ticket",
        "{{ $labels.instance }} has no memory for further requests; they wait.",
    ),
    Alert(
        "CounselAdapterFails",
        'sum by (adapter) (increase(counsel_adapter_events_total{event="fail"}[15m])) > 0',
        "0m",
        "ticket",
        "{{ $labels.adapter }} could not be loaded.",
    ),
    Alert(
        "CounselAdaptersThrash",
        'sum by (instance) (rate(counsel_adapter_events_total{event="load"}[10m])) > 0.5',
        "10m",
        "ticket",
        "{{ $labels.instance }} loads {{ $value | humanize }} adapters a second: more are in use than it has room for.",
    ),
)


def metrics() -> set[str]:
    """The metrics that any panel or rule reads, as a scrape names them; `up` is Prometheus's own."""
    expressions = [e for panel in PANELS for e in panel.expressions.values()] + [a.expression for a in ALERTS]
    return {name for e in expressions for name in re.findall(r"\b(?:counsel_|vllm:)\w+", e)}


def rules() -> str:
    """The alerting rules as Prometheus reads them."""
    group = {
        "name": "counsel",
        "rules": [
            {
                "alert": alert.name,
                "expr": alert.expression,
                "for": alert.holds,
                "labels": {"severity": alert.severity},
                "annotations": {"summary": alert.meaning, "runbook": RUNBOOK},
            }
            for alert in ALERTS
        ],
    }
    head = "# Written by deploy/monitoring/generate.py; change the lists there.\n"
    return head + yaml.safe_dump({"groups": [group]}, sort_keys=False, width=120)


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's own JSON form, two panels to a row."""
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "title": "Counsel Stack",
        "uid": "counsel-stack",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [
            {
                "id": number + 1,
                "type": "timeseries",
                "title": panel.title,
                "datasource": source,
                "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(65 + i), "datasource": source, "expr": expression, "legendFormat": legend}
                    for i, (legend, expression) in enumerate(panel.expressions.items())
                ],
            }
            for number, panel in enumerate(PANELS)
        ],
    }


def write() -> None:
    """Write both files."""
    RULES.write_text(rules(), encoding="utf-8")
    DASHBOARD.write_text(json.dumps(dashboard(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
