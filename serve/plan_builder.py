"""What a launch plan is made of: the command line, the environment, and a reason for each choice."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from counsel.adapter_check import SERVED_RANKS


class Reason(NamedTuple):
    """One choice, and why it was made, as the user reads it."""

    choice: str
    why: str


class LaunchPlan(NamedTuple):
    """What to start: the whole argv, the environment variables to add, and a reason for each choice."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    reasons: tuple[Reason, ...]

    def explain(self) -> str:
        """One line per choice."""
        return "\n".join(f"  {reason.choice}: {reason.why}" for reason in self.reasons)


class PlanBuilder:
    """Collects flags, variables and reasons in the order of the choices."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.argv: list[str] = []
        self.env: dict[str, str] = {}
        self.reasons: list[Reason] = []

    def flag(self, name: str, *values: str, why: str = "") -> None:
        self.argv += [name, *values]
        if why:
            self.reasons.append(Reason(" ".join((name, *values)), why))

    def variable(self, name: str, value: str, why: str) -> None:
        """Set `name`, unless the user has set it."""
        if name in self.environ:
            self.reasons.append(Reason(f"{name}={self.environ[name]}", "set in your environment"))
        else:
            self.env[name] = value
            self.reasons.append(Reason(f"{name}={value}", why))

    def note(self, choice: str, why: str) -> None:
        """A choice that needs no flag."""
        self.reasons.append(Reason(choice, why))


def unserved_rank(ranks: Sequence[int], max_lora_rank: int) -> str:
    """The reason to give where the store holds an adapter of a higher rank; empty if it holds none."""
    largest = max(ranks, default=0)
    if largest <= max_lora_rank:
        return ""
    needed = min((rank for rank in SERVED_RANKS if rank >= largest), default=largest)
    return (
        f"the store holds an adapter of rank {largest}, which this server refuses (max_lora_rank); "
        f"start with --max-lora-rank {needed} to serve it"
    )
