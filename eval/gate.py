"""Pass or fail a finished evaluation, for CI. Rules test the bounds of intervals, so that luck does not pass.

    python -m eval gate gentle --rules "difference.bits_per_byte.high<0,similarity_max.low>0.3,errors<=0"

| rule | tests |
|---|---|
| `METRIC.BOUND OP NUMBER` | a metric of the adapter |
| `difference.METRIC.BOUND OP NUMBER` | the adapter minus the base |
| `COUNT OP NUMBER` | `errors` of adapter and base together; the adapter's `empty` or `cut` answers |

BOUND is value, low or high; OP is <, <=, > or >=.

A rule on a metric cannot be judged with fewer than `MIN_TESTABLE` questions, with questions missing because rows
failed or answers had no words, or if all questions differ by the same amount, which gives no interval. Exit status: 0
if all rules hold, 3 if one fails, 4 if none fails and one cannot be judged.
"""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from counsel.cli import CANNOT_BE_JUDGED, MISSED, Result
from counsel.errors import UserError
from counsel.values import nearest
from eval.compare import side
from eval.config import GateConfig
from eval.metrics import METRICS
from eval.stats import MIN_TESTABLE

_COUNTS = ("errors", "empty", "cut")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_RULE = re.compile(
    r"\s*(difference\.)?(\w+)(?:\.(value|low|high))?\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*"
)


class Rule(NamedTuple):
    """One condition; `bound` is empty for counts."""

    text: str
    difference: bool
    name: str
    bound: str
    operator: str
    limit: float


def parse_rule(text: str) -> Rule:
    """Read a rule; raises UserError with an example of one."""
    match = _RULE.fullmatch(text)
    if not match:
        raise UserError(
            f"rule {text!r} is not a rule; write one like difference.bits_per_byte.high<0, similarity_max.low>0.3 or "
            "errors<=0"
        )
    difference, name, bound, symbol, limit = match.groups()
    if name in _COUNTS and not difference and not bound:
        return Rule(text.strip(), False, name, "", symbol, float(limit))
    if name not in METRICS:
        raise UserError(f"rule {text!r} names an unknown metric or count; {nearest(name, [*METRICS, *_COUNTS])}")
    if not bound:
        raise UserError(f"rule {text!r} needs a bound: {name}.low, {name}.high or {name}.value")
    return Rule(text.strip(), bool(difference), name, bound, symbol, float(limit))


class Observed(NamedTuple):
    """The number that a rule tests, over n questions (or rows); `problem` says why the rule cannot be judged."""

    value: float | None
    n: int
    problem: str | None = None


def observed(rule: Rule, arm: str, base: str, summary: Mapping[str, Any]) -> Observed:
    """Look up the number that a rule tests."""
    if not rule.bound:
        counted = {arm, base} & summary["arms"].keys() if rule.name == "errors" else {arm}
        arms = [summary["arms"][name] for name in counted]
        return Observed(sum(one[rule.name] for one in arms), sum(one["rows"] + one["likelihoods"] for one in arms))
    if rule.difference:
        rows = [r for r in summary["differences"] if (r["arm"], r["against"], r["metric"]) == (arm, base, rule.name)]
        cell = rows[0] if rows else None
    else:
        cell = summary["arms"][arm]["metrics"].get(rule.name)
    if cell is None:
        return Observed(None, 0, f"this evaluation has no such metric for {arm}")
    value, n = cell[rule.bound], cell["n"]
    problem = None
    if cell["missing"]:
        problem = f"{cell['missing']} questions are missing: their rows failed or have no words"
    elif n < MIN_TESTABLE:
        problem = f"needs at least {MIN_TESTABLE} questions: fewer cannot show a difference"
    elif value is None:
        problem = "all questions differ by the same amount, so there is no interval"
    return Observed(value, n, problem)


def gate(config: GateConfig) -> Result:
    """Print each rule with its verdict and the number observed."""
    rules = [parse_rule(text) for text in config.rules]
    if not rules:
        raise UserError("rules is empty, and a gate without rules always passes; give one, such as errors<=0")
    one = side(config.side)
    base, results = one.summary["spec"]["base"], []
    for rule in rules:
        value, n, problem = observed(rule, one.arm, base, one.summary)
        passed = None if problem or value is None else _OPERATORS[rule.operator](value, rule.limit)
        results.append({"rule": rule.text, "observed": value, "n": n, "passed": passed, "problem": problem})
        number = "none" if value is None else f"{value:.4g}"
        verdict = {True: "pass", False: "FAIL", None: "????"}[passed]
        print(
            f"{verdict}  {rule.text}  (observed {number}, n {n}){f': cannot be judged: {problem}' if problem else ''}"
        )
    verdicts = {result["passed"] for result in results}
    status = MISSED if False in verdicts else CANNOT_BE_JUDGED if None in verdicts else 0
    return Result({"side": one.label, "passed": status == 0, "rules": results}, status)
