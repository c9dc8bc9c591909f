"""`python -m serve canary watch`: decides about a canary by rules, and acts."""

import math
import shlex
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from annotated_types import Gt, Lt

from counsel import rollout
from counsel.cli import CANNOT_BE_JUDGED, MISSED, Result, argument, option
from counsel.errors import UserError
from counsel.files import read_jsonl
from counsel.report.tables import text_table
from counsel.rollout import CanarySides
from counsel.values import NonNegativeFloat, PositiveFloat, PositiveInt
from serve.canary import decision as deciding
from serve.canary.decision import PROMOTE, ROLL_BACK, WAIT, Harm, Look
from serve.canary.evidence import (
    CURRENT,
    LATENCIES,
    NEW,
    SideUnit,
    count_votes,
    log_rows,
    reached_utc,
    rows_until,
    sides_in,
)  # fmt: skip

# Its file descriptor: stdout is for this command's own result.
_STDERR = 2
_RULES = "rules; 0: not judged"


@dataclass(frozen=True)
class CanaryRules:
    """What decides about a canary."""

    name: str = argument("adapter name")
    failed: NonNegativeFloat = option(
        0.03, "largest rise of the share of conversations with a failed request (5xx)", group=_RULES
    )
    ttft: NonNegativeFloat = option(0.2, "largest rise of the time to first token, as a share of it", group=_RULES)
    time_per_token: NonNegativeFloat = option(0.2, "the same of the time per output token", group=_RULES)
    votes_lost: NonNegativeFloat = option(
        0.0, "how far above one half the share of people's choices against it may be", group=_RULES
    )
    bad_votes: NonNegativeFloat = option(0.0, "largest rise of the share of single answers voted bad", group=_RULES)
    checks: tuple[str, ...] = option(
        (), "commands that must end with exit status 0 before it is promoted; 3 rolls it back", metavar="COMMANDS"
    )
    units: PositiveInt = option(300, "conversations of each side at the last look")
    looks: PositiveInt = option(5, "looks at the evidence, at equal steps up to --units")
    alpha: Annotated[float, Gt(0), Lt(0.5)] = option(0.05, "chance of a wrong rollback, and of a wrong promotion")
    store: str = option("store", "adapter store")
    logs: str = option("runs/serve", "folder of the servers' logs", metavar="FOLDER")
    votes: str = option("runs/votes", "folder with votes.jsonl", metavar="FOLDER")
    poll_s: PositiveFloat = option(5.0, "seconds between reads of the logs", metavar="SECONDS")

    def margins(self) -> dict[str, float]:
        """The margin of each measure that is judged."""
        margins = {
            deciding.FAILED: self.failed, deciding.TTFT: self.ttft, deciding.TIME_PER_TOKEN: self.time_per_token,
            deciding.VOTES_LOST: self.votes_lost, deciding.BAD_VOTES: self.bad_votes,
        }  # fmt: skip
        return {name: margin for name, margin in margins.items() if margin}


class Evidence(NamedTuple):
    """What is known by now: the logged requests, oldest first, and the votes."""

    rows: Sequence[dict[str, Any]]
    votes: Sequence[dict[str, Any]]


def watch_canary(rules: CanaryRules) -> Result:
    """Promote or roll back as soon as the rules decide; end undecided after the last look."""
    if not rules.margins():
        raise UserError("every rule is 0, so nothing would be judged; set at least one, such as --failed 0.03")
    found = rollout.canary_sides(Path(rules.store), rules.name)
    sticky = found.canary.sticky
    print(f"{found.new.id} against {found.current.id}, {rules.looks} looks up to {rules.units} {sticky}s each")
    seen = 0
    while True:
        looks = looks_at(read_evidence(rules, found), found, rules)
        for one in looks[seen:]:
            print(_line(one, sticky), flush=True)
        seen = len(looks)
        if looks and (looks[-1].decision != WAIT or looks[-1].n_units == rules.units):
            return _act(rules, found, looks)
        time.sleep(rules.poll_s)
        # Raises when somebody else has ended it.
        if (still := rollout.canary_sides(Path(rules.store), rules.name)).canary.id != found.canary.id:
            raise UserError(f"another canary of {rules.name!r} runs since {still.canary.started_utc}; watch it anew")


def read_evidence(rules: CanaryRules, found: CanarySides) -> Evidence:
    """Read the logs and the votes of a canary."""
    votes = Path(rules.votes) / "votes.jsonl"
    needed = rules.votes_lost or rules.bad_votes
    since = [row for row in read_jsonl(votes, torn=True) if row["time_utc"] >= found.canary.started_utc] if (
        needed and votes.exists()
    ) else []  # fmt: skip
    return Evidence(log_rows(Path(rules.logs), found.canary), since)


def looks_at(evidence: Evidence, found: CanarySides, rules: CanaryRules) -> list[Look]:
    """The looks that the evidence allows, up to the first that decides.

    A look is about what was known when both sides had reached its number of units. So it is the same whenever it is
    taken, and a watch that was stopped goes on where it was.
    """
    everything = sides_in(evidence.rows, found.canary, rules.name)
    looks: list[Look] = []
    for number in range(1, rules.looks + 1):
        n_units = max(1, rules.units * number // rules.looks)
        time_utc = reached_utc(everything, n_units)
        if time_utc is None:
            break
        rows = sides_in(rows_until(evidence.rows, time_utc), found.canary, rules.name)
        votes = count_votes(rows_until(evidence.votes, time_utc), found.current.id, found.new.id)
        looks.append(deciding.judge_look(n_units, rows, votes, rules.margins(), rules.alpha, rules.looks))
        if looks[-1].decision != WAIT:
            break
    return looks


def print_sides(rules: CanaryRules, found: CanarySides) -> dict[str, Any]:
    """Print what both sides did until now; return the numbers."""
    units = sides_in(read_evidence(rules, found).rows, found.canary, rules.name)
    heading = ("side", "version", f"{found.canary.sticky}s", "failed", "median ttft", "median time per token")
    sides: dict[str, Any] = {}
    for side, manifest in ((CURRENT, found.current), (NEW, found.new)):
        own = units[side].values()
        sides[side] = {
            "version": manifest.id, "units": len(own), "failed": sum(one.failed for one in own),
            **{f"{name}_median": _median(own, name) for name in LATENCIES},
        }  # fmt: skip
    rows = [(side, *(_cell(value) for value in facts.values())) for side, facts in sides.items()]
    print(text_table([heading, *rows], numbers_from=2))
    return sides


def _median(units: Iterable[SideUnit], latency: str) -> float | None:
    logs = [log for one in units if (log := one.mean_log(latency)) is not None]
    return round(math.exp(statistics.median(logs)), 6) if logs else None


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value * 1e3:.1f} ms" if isinstance(value, float) else str(value)


def _act(rules: CanaryRules, found: CanarySides, looks: Sequence[Look]) -> Result:
    store, last = Path(rules.store), looks[-1]
    decision = last.decision
    failed_check = ""
    if decision == PROMOTE:
        decision, failed_check = _run_checks(rules.checks)
    if decision == PROMOTE:
        rollout.promote_canary(store, rules.name, only=found.canary.id)
        print(f"promoted: {rules.name} is {found.new.id} now")
    elif decision == ROLL_BACK:
        rollout.end_canary(store, rules.name, only=found.canary.id)
        print(f"rolled back: {rules.name} is {found.current.id} for everybody")
    else:
        print(f"undecided, and the canary goes on: python -m serve canary promote {rules.name}, or canary rollback")
    harms = {name: harm._asdict() for name, harm in last.harms.items()}
    document = {
        "adapter": found.new.id, "against": found.current.id, "decision": decision, "looks": len(looks),
        "units": last.n_units, "harms": harms, "failed_check": failed_check,
    }  # fmt: skip
    return Result(document, {PROMOTE: 0, ROLL_BACK: MISSED, WAIT: CANNOT_BE_JUDGED}[decision])


def _run_checks(checks: Sequence[str]) -> tuple[str, str]:
    """Run commands until one does not end with 0; return what that means, and the command."""
    for command in checks:
        print(f"check: {command}", flush=True)
        try:
            status = subprocess.run(shlex.split(command), stdout=_STDERR, check=False).returncode
        except (OSError, ValueError) as error:
            raise UserError(f"the check {command!r} cannot be run: {error}; the canary goes on") from error
        if status:
            return (ROLL_BACK if status == MISSED else WAIT), command
    return PROMOTE, ""


def _line(one: Look, sticky: str) -> str:
    parts = [f"{name} {_shown(harm)}" for name, harm in one.harms.items()]
    return f"{one.n_units} {sticky}s each: {', '.join(parts)}: {one.decision}"


def _shown(harm: Harm) -> str:
    value, low, high = harm
    if value is None:
        return "not seen"
    return f"{value:+.1%} ({low:+.1%} to {high:+.1%})" if low is not None else f"{value:+.1%} (no spread)"
