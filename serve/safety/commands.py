"""The crisis gate's commands, and what a server says of it at its start."""

import datetime
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from counsel.cli import Command, Result, argument, option
from counsel.errors import UserError
from counsel.files import read_json
from counsel.report.tables import text_table
from counsel.safety.policy import OFF, ON, read_policy

# What a server with the gate on writes to its logs, and `/version` shows.
SHOWN = "safety.json"


@dataclass(frozen=True)
class SafetyCheck:
    policy: str = argument("a policy file", ON, shown="the shipped one")
    today: str = option("", "date to check the services' age against", shown="today", metavar="YYYY-MM-DD")


@dataclass(frozen=True)
class SafetyYears:
    logs: str = option("runs/serve", "folder of the servers' logs", metavar="FOLDER")
    year: str = option("", "one year (UTC)", shown="all")


OFF_LINES = "\n".join(("!" * 78, "SAFETY OFF: no message and no answer is checked. For research only.", "!" * 78))


def safety_lines(log_dir: Path) -> str:
    """What a started server says of its gate: the policy, and the detector's measured figures, from `log_dir`."""
    shown = read_json(log_dir / SHOWN)
    lines = [f"safety   on, policy {shown['policy']}; not for crisis management: it misses what its detector misses"]
    for name in ("recall", "false_positives"):
        measured = ", ".join(
            f"{of} {cell['value']:.2f} ({cell['low']:.2f} to {cell['high']:.2f}, n {cell['n']})"
            for of, cell in shown["detector"].get(name, {}).items()
        )
        lines.append(f"         {name.replace('_', ' ')}: {measured or 'not measured'}")
    return "\n".join(lines)


def check_policy(options: SafetyCheck) -> Result:
    """Check a policy, its texts, and that no crisis service was verified more than 180 days ago."""
    policy = read_policy(options.policy)
    if policy is None:
        raise UserError(f"policy is {OFF!r}; give a policy file, or nothing for the shipped one")
    try:
        today = datetime.date.fromisoformat(options.today) if options.today else datetime.date.today()
    except ValueError as error:
        raise UserError(f"today is {options.today!r}; it must be a date such as 2026-11-27") from error
    resources = policy.read_texts().resources
    rows = [(r.country, r.name, r.channel, r.number, str(r.verified_on), r.source) for r in resources]
    print(text_table([("country", "service", "channel", "number", "verified", "source"), *rows]))
    resources.check_age(today)
    return Result({"policy": policy.digest, "services": len(resources)})


def show_counts(options: SafetyYears) -> Result:
    """Show how often the gate acted, by year: counts alone, for a yearly report."""
    from serve.safety.counts import counts_under

    years = counts_under(Path(options.logs))
    if options.year:
        years = {options.year: years.get(options.year, Counter())}
    rows = [
        (year, name, str(number)) for year, counts in sorted(years.items()) for name, number in sorted(counts.items())
    ]
    print(text_table([("year", "action", "count"), *rows]) if rows else f"no action was counted under {options.logs}")
    return Result({"years": {year: dict(counts) for year, counts in years.items()}})


COMMANDS = {
    "safety check": Command(SafetyCheck, check_policy, "check a crisis policy and the age of its services"),
    "safety counts": Command(SafetyYears, show_counts, "show how often the crisis gate acted, by year"),
}
