"""Let a finished evaluation pass or fail, for CI: rules on the bounds of intervals, so that luck does not pass.

    python -m eval gate gentle --rules "difference.bits_per_byte.high<0,similarity_max.low>0.3,errors<=0"

A rule is `METRIC.BOUND OP NUMBER` on the adapter itself, `difference.METRIC.BOUND OP NUMBER` on adapter minus base, or
`COUNT OP NUMBER` with `errors`, `empty` or `cut`. BOUND is value, low or high; OP is <, <=, > or >=. Exit 1 when one
fails.
"""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from eval.compare import side
from eval.config import GateConfig
from eval.metrics import METRICS
from train.command import Result, nearest
from train.errors import UserError

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


def observed(rule: Rule, arm: str, base: str, summary: Mapping[str, Any]) -> float:
    """The number that a rule is about; UserError when the evaluation does not have it."""
    if not rule.bound:
        return float(summary["arms"][arm][rule.name])
    if rule.difference:
        rows = [r for r in summary["differences"] if (r["arm"], r["against"], r["metric"]) == (arm, base, rule.name)]
        found = rows[0] if rows else {}
    else:
        found = summary["arms"][arm]["metrics"].get(rule.name, {})
    if found.get(rule.bound) is None:
        raise UserError(f"rule {rule.text!r}: this evaluation has no such number for {arm}")
    return float(found[rule.bound])


def gate(config: GateConfig) -> Result:
    """Print each rule with what was observed; exit status 1 when one fails."""
    rules = [parse_rule(text) for text in config.rules]
    if not rules:
        raise UserError("rules is empty: a gate without rules would always pass")
    one = side(config.side)
    base, results = one.summary["plan"]["base"], []
    for rule in rules:
        value = observed(rule, one.arm, base, one.summary)
        passed = _OPERATORS[rule.operator](value, rule.limit)
        results.append({"rule": rule.text, "observed": value, "passed": passed})
        print(f"{'pass' if passed else 'FAIL'}  {rule.text}  (observed {value:.4g}, n {one.summary['questions']})")
    passed = all(result["passed"] for result in results)
    return Result({"side": one.label, "passed": passed, "rules": results}, 0 if passed else 1)
