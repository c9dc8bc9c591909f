"""Writes what a run needs before it starts to its results directory: scenario, models, prompts, plan."""

import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from counsel.client import list_models
from counsel.errors import UserError
from counsel.files import read_jsonl, write_json, write_jsonl
from counsel.run import open_run, provenance
from counsel.values import nearest
from loadtest.arrivals import due_times, rate_knots, trace_times
from loadtest.mix import choose_models, shares, with_cold_requests
from loadtest.scenario import Scenario
from loadtest.slo import parse_objective
from loadtest.stream import make_stream_client
from loadtest.workload import Arrival, Prompts, Workload, make_plan

# A closed loop has no schedule; its clients repeat a plan of this many requests.
_CLOSED_PLAN = 4096


class Models(NamedTuple):
    """The models to load: their names in the server's order, and which of them is the base (None: not among them)."""

    names: tuple[str, ...]
    base: str | None


def prepare_run(scenario: Scenario) -> Path:
    """Make the results directory with config.json, target.json, prompts.jsonl and plan.jsonl; return its path.

    Raises UserError for an unreachable server, an unknown model, a missing run, or a plan without requests.
    """
    questions = read_questions(scenario)
    models = target_models(scenario)
    plan, prompts = build_plan(scenario, models, questions)
    requested = requested_models(scenario, models, plan)
    directory = results_directory(scenario)
    if directory.exists():
        raise UserError(f"{str(directory)!r} exists; choose another --out")
    if scenario.unique_prompts:
        # Without a tag per run, the server's prefix cache would hold the same prompts from the run before.
        tag = secrets.token_hex(2)
        prompts = [f"[{tag}]{text}" for text in prompts]
    write_json(directory / "config.json", scenario.to_json())
    target = {"models": models.names, "asked": requested, "base": models.base, **provenance()}
    write_json(directory / "target.json", target)
    write_jsonl(directory / "prompts.jsonl", ({"question": text} for text in prompts))
    write_jsonl(directory / "plan.jsonl", (arrival.to_json() for arrival in plan))
    return directory


def results_directory(scenario: Scenario) -> Path:
    """Where the results go: `out`, or a folder named by the UTC time, in the run or here."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    if scenario.out:
        return Path(scenario.out)
    return open_run(scenario.run).path / "loadtest" / stamp if scenario.run else Path(f"loadtest-{stamp}")


def read_questions(scenario: Scenario) -> list[str]:
    """The distinct questions to ask, in file order."""
    if scenario.run:
        source, rows = f"the test split of run {scenario.run!r}", open_run(scenario.run).split("test")
    elif scenario.prompts:
        source, rows = repr(scenario.prompts), read_jsonl(Path(scenario.prompts))
    else:
        raise UserError("nothing to ask: give --run NAME for its held-out questions, or --prompts FILE.jsonl")
    questions = list(dict.fromkeys(str(row.get("question", "")).strip() for row in rows))
    questions = [question for question in questions if question]
    if not questions:
        raise UserError(f"{source} has no questions; each line needs a non-empty string under the key 'question'")
    return questions


def target_models(scenario: Scenario) -> Models:
    """The models that the scenario names, or all that the server lists by name."""
    client = make_stream_client(scenario.url)
    try:
        server = list_models(client)
    finally:
        client.close()
    for name in scenario.models:
        if name not in server.roots:
            raise UserError(f"the server at {scenario.url} has no model {name!r}; {nearest(name, server.roots)}")
    names = scenario.models or server.names
    for scope in (parse_objective(text).scope for text in scenario.slo):
        if scope not in ("", "*", *names):
            raise UserError(f"slo names the model {scope!r}, which is not in this run; {nearest(scope, names)}")
    # vLLM lists a base once per --served-model-name.
    bases = [name for name in server.names if name not in server.adapters]
    return Models(names, next((base for base in bases if base in names), None))


def build_plan(scenario: Scenario, models: Models, questions: Sequence[str]) -> tuple[list[Arrival], list[str]]:
    """The plan and its prompts. The same scenario, models and questions give the same plan."""
    due_s, traced = _due_times(scenario)
    if scenario.requests:
        due_s = due_s[: scenario.requests]
    if not due_s:
        raise UserError(
            f"rate is {scenario.rate!r} and duration_s {scenario.duration_s:g}, which give no request; raise one"
        )
    shares_by_model = shares(scenario.mix, models.names, models.base, scenario.base_share)
    chosen = choose_models(shares_by_model, len(due_s), scenario.seed)
    adapters = [name for name in models.names if name != models.base]
    prompts = Prompts(questions, scenario.unique_prompts, scenario.seed)
    workload = Workload(
        output_tokens=scenario.output_tokens, prompt_words=scenario.prompt_words, turns=scenario.turns,
        think_s=scenario.think_s, long_share=scenario.long_share, long_words=scenario.long_words,
        cancel_share=scenario.cancel_share, cancel_after_s=scenario.cancel_after_s,
    )  # fmt: skip
    chosen_or_cold = with_cold_requests(chosen, adapters, scenario.cold_share, scenario.seed)
    plan = make_plan(due_s, chosen_or_cold, prompts, workload, scenario.seed)
    for index, fields in enumerate(traced[: len(plan)]):
        plan[index] = plan[index]._replace(**fields)
    unknown = sorted({arrival.model for arrival in plan} - set(models.names))
    if unknown:
        raise UserError(
            f"trace {scenario.trace!r} names the model {unknown[0]!r}, which is not in this run; "
            f"{nearest(unknown[0], models.names)}"
        )
    return plan, prompts.texts


def requested_models(scenario: Scenario, models: Models, plan: Sequence[Arrival]) -> list[str]:
    """The models that this run requests: those that have a share of the mix, or those that a trace names."""
    planned = {arrival.model for arrival in plan}
    if not scenario.trace:
        given = shares(scenario.mix, models.names, models.base, scenario.base_share)
        planned |= {name for name in models.names if given[name] > 0 or (scenario.cold_share and name != models.base)}
    return [name for name in models.names if name in planned]


def _due_times(scenario: Scenario) -> tuple[list[float], list[dict[str, Any]]]:
    """When requests are due; for a trace also the model and max_tokens that its lines give."""
    if scenario.closed:
        return [0.0] * (scenario.requests or _CLOSED_PLAN), []
    if scenario.arrivals != "trace":
        knots = rate_knots(scenario.rate, scenario.duration_s)
        return due_times(scenario.arrivals, knots, scenario.burstiness, scenario.seed), []
    rows = read_jsonl(Path(scenario.trace))
    try:
        rows.sort(key=lambda row: float(row["timestamp"]))
        stamps = [float(row["timestamp"]) for row in rows]
        traced = [
            {key: kind(row[key]) for key, kind in (("model", str), ("max_tokens", int)) if key in row} for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"trace {scenario.trace!r} has a line with a bad or missing value: {error}; "
            "each needs `timestamp` in seconds, and may have `model` and `max_tokens`"
        ) from error
    if not rows:
        raise UserError(f"trace {scenario.trace!r} is empty; each line needs a JSON object with the key `timestamp`")
    due_s = trace_times(stamps, scenario.duration_s, scenario.trace_speed)
    if len(due_s) < len(stamps):
        print(f"{scenario.trace}: {len(due_s)} of {len(stamps)} arrivals are due within duration_s "
              f"{scenario.duration_s:g}; the rest are left out", file=sys.stderr)  # fmt: skip
    return due_s, traced
