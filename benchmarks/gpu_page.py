"""The GPU proof's page: its verdict, one table of steps, and the tables of speed and training."""

from typing import Any

from benchmarks.steps import DONE
from counsel.report import page, section

TINY_WARNING = "Tiny models: this shows that the proof runs. It is not a measurement, and no GPU was needed."
ONCE = "Each figure was measured once, so a difference of a few percent means nothing."


def outcome(row: dict[str, Any]) -> str:
    """What a row says in a word or two."""
    if row["status"] != DONE:
        return str(row["status"])
    return {True: "right", False: "missed", None: "measured"}[row["figures"]["ok"]]


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    return f"{row['step']:<16} {outcome(row):<10} {row['seconds']:6.1f} s  {row['reason']}".rstrip()


def proof_page(document: dict[str, Any]) -> str:
    """The page for a proof.json."""
    rows = {row["step"]: row for row in document["steps"]}
    figures = {name: row["figures"] for name, row in rows.items() if row["status"] == DONE}
    sections = [section("Steps", [("step", "outcome", "seconds", "details"), *map(_step_cells, rows.values())])]
    if speed := _speed_cells(figures, document["ratios"]):
        sections.append(section("Tokens per second", speed, note=ONCE))
    if "first_token" in figures:
        sections.append(section("Time to first token", _first_token_cells(figures["first_token"]["first_token_s"]),
                                note="Streams begin all at once; base and adapters are mixed."))  # fmt: skip
    if training := _training_cells(figures):
        sections.append(section("Training", training, note=ONCE))
    made = [("what", "value"), ("device", document["device"]), ("processor", document["processor"]),
            ("commit", f"{document['git']}{'' if document['git_clean'] else ', with changes'}"),
            ("time", document["time_utc"]), *document["versions"].items()]  # fmt: skip
    sections.append(section("How it was made", made, folded=True))
    return page(
        "GPU proof",
        sections,
        finding=f"{document['device']}: {document['verdict']}.",
        warnings=[TINY_WARNING] if document["tiny"] else [],
    )


def _step_cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    shown = {key: value for key, value in row["figures"].items() if key != "ok" and not isinstance(value, dict | list)}
    shown |= {key: value for key, value in row["figures"].items() if key in ("differ", "mixed_up") and value}
    details = row["reason"] or ", ".join(f"{key} {_text(value)}" for key, value in shown.items())
    return row["step"], outcome(row), f"{row['seconds']:.1f}", details


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {each}" for key, each in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _speed_cells(figures: dict[str, Any], ratios: dict[str, float]) -> list[tuple[str, ...]]:
    ours, bare = (figures.get(step, {}).get("tokens_s", {}) for step in ("throughput", "bare_throughput"))
    cells = [
        (
            cell,
            f"{ours[cell]:,.1f}" if cell in ours else "-",
            f"{bare[cell]:,.1f}" if cell in bare else "-",
            _ratio(ratios.get(f"{cell}_vs_base")),
            _ratio(ratios.get(f"{cell}_vs_bare")),
        )
        for cell in ours | bare
    ]
    return [("load", "ours", "bare vLLM", "ours, of base", "ours, of bare"), *cells] if cells else []


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _first_token_cells(figures: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    return [
        ("streams", "n", "p50, ms", "p90, ms", "p99, ms"),
        *((name.removeprefix("c"), str(each["n"]), *(f"{1000 * each[p]:.1f}" for p in ("p50", "p90", "p99")))
          for name, each in figures.items()),
    ]  # fmt: skip


def _training_cells(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    names = {"train_ours": "ours", "train_trl": "TRL's defaults", "train_reference": "reference, 4-bit"}
    cells = [
        (
            shown,
            f"{each['tokens_per_s']:,.1f}",
            f"{each['peak_memory_bytes'] / 2**30:.2f}",
            f"{each['estimated_memory_bytes'] / 2**30:.2f}" if "estimated_memory_bytes" in each else "-",
            str(each["steps"]),
            "; ".join(f"{item['asked']} -> {item['used']}" for item in each.get("downgrades", [])) or "none",
        )
        for step, shown in names.items()
        if (each := figures.get(step))
    ]
    return [("trainer", "tokens/s", "peak memory, GiB", "estimated", "steps", "downgrades"), *cells] if cells else []
