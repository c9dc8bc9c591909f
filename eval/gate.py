"""Let a finished evaluation pass or fail, for CI: rules on the bounds of intervals, so that luck does not pass.

    python -m eval gate gentle --rules "difference.bits_per_byte.high<0,similarity_max.low>0.3,errors<=0"

A rule is `METRIC.BOUND OP NUMBER` on the adapter itself, `difference.METRIC.BOUND OP NUMBER` on adapter minus base, or
`COUNT OP NUMBER`: `errors` of adapter and base together, the adapter's `empty` or `cut` answers. BOUND is value, low or
high; OP is <, <=, > or >=.

A rule on a metric cannot be judged with fewer than `LEAST_TO_SHOW` questions, with questions missing because a row
failed or no answer had a word, or without such a bound (where all questions differ by the same). Exit status 0 when
all rules hold, 3 when one fails, 4 when none fails and one cannot be judged.
"""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from counsel.cli import CANNOT_BE_JUDGED, MISSED, Result, nearest
from counsel.errors import UserError
from eval.compare import side
from eval.config import GateConfig
from eval.metrics import METRICS
from eval.stats import LEAST_TO_SHOW
from eval.summary import FORMAT

_COUNTS = ("errors", "empty", "cut")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_RULE = re.compile(
    r"\s*(difference\.)?(\w+)(?:\.(value|low|high))?\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*"
)


class Rule(NamedTuple):
    """One condition. `bound` is empty for counts."""

    text: str
    difference: bool
    name: str
    bound: str
    operator: str
    limit: float


def parse_rule(text: str) -> Rule:
    """Read a rule; raise UserError that says what a rule looks like."""
    match = _RULE.fullmatch(text)
    if not match:
        raise UserError(
            f"rule {text!r} is not like difference.bits_per_byte.high<0, similarity_max.low>0.3 or errors<=0"
        )
    difference, name, bound, symbol, limit = match.groups()
    if name in _COUNTS and not difference and not bound:
        return Rule(text.strip(), False, name, "", symbol, float(limit))
    if name not in METRICS:
        raise UserError(f"rule {text!r} names no metric or count; {nearest(name, [*METRICS, *_COUNTS])}")
    if not bound:
        raise UserError(f"rule {text!r} needs a bound: {name}.low, {name}.high or {name}.value")
    return Rule(text.strip(), bool(difference), name, bound, symbol, float(limit))


class Observed(NamedTuple):
    """What an evaluation says to a rule: a number over n questions (or rows), or the problem that leaves it open."""

    value: float | None
    n: int
    problem: str | None = None


def observed(rule: Rule, arm: str, base: str, summary: Mapping[str, Any]) -> Observed:
    """The number that a rule is about."""
    if not rule.bound:
        counted = {arm, base} & summary["arms"].keys() if rule.name == "errors" else {arm}
        each = [summary["arms"][name] for name in counted]
        return Observed(sum(found[rule.name] for found in each), sum(a["rows"] + a["likelihoods"] for a in each))
    if rule.difference:
        rows = [r for r in summary["differences"] if (r["arm"], r["against"], r["metric"]) == (arm, base, rule.name)]
        found = rows[0] if rows else None
    else:
        found = summary["arms"][arm]["metrics"].get(rule.name)
    if found is None:
        return Observed(None, 0, f"this evaluation has no such number for {arm}")
    value, n = found[rule.bound], found["n"]
    problem = None
    if found["missing"]:
        problem = f"{found['missing']} more questions are missing: their rows failed, or have no word"
    elif n < LEAST_TO_SHOW:
        problem = f"fewer than {LEAST_TO_SHOW} questions can show nothing"
    elif value is None:
        problem = "all questions differ by the same, which leaves nothing to tell from luck"
    return Observed(value, n, problem)


def gate(config: GateConfig) -> Result:
    """Print each rule with what was observed."""
    rules = [parse_rule(text) for text in config.rules]
    if not rules:
        raise UserError("rules is empty: a gate without rules would always pass")
    one = side(config.side)
    if one.summary["format"] != FORMAT:
        raise UserError(
            f"{str(one.folder)!r} was made by another version; first give python -m eval report {one.folder}"
        )
    base, results = one.summary["spec"]["base"], []
    for rule in rules:
        value, n, problem = observed(rule, one.arm, base, one.summary)
        passed = None if problem or value is None else _OPERATORS[rule.operator](value, rule.limit)
        results.append({"rule": rule.text, "observed": value, "n": n, "passed": passed, "problem": problem})
        shown = "none" if value is None else f"{value:.4g}"
        verdict = {True: "pass", False: "FAIL", None: "????"}[passed]
        print(f"{verdict}  {rule.text}  (observed {shown}, n {n}){f': cannot be judged: {problem}' if problem else ''}")
    verdicts = {result["passed"] for result in results}
    status = MISSED if False in verdicts else CANNOT_BE_JUDGED if None in verdicts else 0
    return Result({"side": one.label, "passed": status == 0, "rules": results}, status)
