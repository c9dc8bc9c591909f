"""The canary's commands of `python -m serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt, Lt

from counsel import rollout
from counsel.canary import CONVERSATION
from counsel.cli import Command, Result, argument, option
from counsel.rollout import CanarySides
from serve.canary.watch import CanaryRules, print_sides
from serve.server_registry import registered_servers

CanaryShare = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True)
class CanaryStart:
    adapter: str = argument("name@version: the version to try")
    share: CanaryShare = option(0.1, "share of the conversations that get it")
    sticky: Annotated[str, Literal["conversation", "key"]] = option(
        CONVERSATION, "what stays on one side: each conversation, or each API key"
    )
    store: str = option("store", "adapter store")


@dataclass(frozen=True)
class CanaryName:
    name: str = argument("adapter name")
    store: str = option("store", "adapter store")


@dataclass(frozen=True)
class CanaryStatus:
    name: str = argument("adapter name")
    store: str = option("store", "adapter store")
    logs: str = option("runs/serve", "folder of the servers' logs", metavar="FOLDER")


def start_by_command(options: CanaryStart) -> Result:
    """Start a canary, or change the share of one that runs; servers follow within 2 s."""
    found = rollout.start_canary(Path(options.store), options.adapter, options.share, options.sticky)
    print_started(Path(options.store), found)
    return Result(
        {"adapter": found.new.id, "against": found.current.id, "share": found.canary.share, "canary": found.canary.id},
        next=f"let rules decide: python -m serve canary watch {found.new.name}",
    )


def print_started(store: Path, found: CanarySides) -> None:
    """Say who gets which version, and which servers cannot take part."""
    units = f"{found.canary.sticky}s"
    print(
        f"{found.new.name} is {found.new.id} for {found.canary.share:.1%} of {units}, {found.current.id} for the rest"
    )
    for server in registered_servers(store):
        if reason := server.unservable_reason(found.new):
            print(f"{server.url} cannot serve {found.new.id}, and answers with {found.current.id}: {reason}")


def show_sides(options: CanaryStatus) -> Result:
    """Show both sides of a canary: conversations, failures and medians."""
    found = rollout.canary_sides(Path(options.store), options.name)
    print_started(Path(options.store), found)
    sides = print_sides(CanaryRules(options.name, store=options.store, logs=options.logs), found)
    return Result({"share": found.canary.share, "started_utc": found.canary.started_utc, **sides})


def promote_by_command(options: CanaryName) -> Result:
    """Let the name mean the canary's version for everybody."""
    manifest = rollout.promote_canary(Path(options.store), options.name)
    print(f"promoted: {options.name} is {manifest.id} now")
    return Result({"adapter": manifest.id})


def end_by_command(options: CanaryName) -> Result:
    """End the canary: the name means its current version for everybody."""
    manifest = rollout.end_canary(Path(options.store), options.name)
    meant = manifest.id if manifest else "no version"
    print(f"rolled back: {options.name} is {meant} for everybody")
    return Result({"adapter": meant})


COMMANDS = {
    "canary": Command(CanaryStart, start_by_command, "let a share of conversations get another version of an adapter"),
    "canary status": Command(CanaryStatus, show_sides, "show what both sides of a canary did"),
    "canary watch": Command(
        CanaryRules, "serve.canary.watch:watch_canary", "promote or roll back a canary by rules (exit status 0, 3, 4)"
    ),
    "canary promote": Command(CanaryName, promote_by_command, "let the name mean the canary's version"),
    "canary rollback": Command(CanaryName, end_by_command, "end the canary"),
}
