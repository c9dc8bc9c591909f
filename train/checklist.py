"""Runs checks, and reports the result of each as a finding."""

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

from counsel.errors import UserError

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


class Finding(NamedTuple):
    """The result of one check: its name, whether it passed, and the details."""

    check: str
    ok: bool
    seen: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.check:<10} {self.seen}"


class Checklist:
    """Runs checks, turns each result or UserError into a finding, and remembers whether all passed."""

    def __init__(self, on_finding: Callable[[Finding], None]) -> None:
        self.on_finding = on_finding
        self.all_ok = True

    def add(self, finding: Finding) -> None:
        self.all_ok &= finding.ok
        self.on_finding(finding)

    def run(
        self, name: str, function: Callable[Arguments, str], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> None:
        """Run a check that returns the finding's details."""
        try:
            self.add(Finding(name, True, function(*args, **kwargs)))
        except UserError as error:
            self.add(Finding(name, False, str(error)))

    def load(
        self,
        name: str,
        function: Callable[Arguments, tuple[Value, str]],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Value | None:
        """Run a check that also loads something, and return that; None if the check fails."""
        try:
            value, details = function(*args, **kwargs)
        except UserError as error:
            self.add(Finding(name, False, str(error)))
            return None
        self.add(Finding(name, True, details))
        return value
