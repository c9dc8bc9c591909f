"""Crisis services by country: versioned data, and how old it may be."""

import dataclasses
import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from counsel.errors import UserError

SHIPPED = Path(__file__).parent / "resources.yaml"
MAX_AGE_DAYS = 180
EMERGENCY = "emergency"
# What is said where no service is known.
ANY_EMERGENCY_NUMBER = "your local emergency number"
DIRECTORY = "findahelpline.com lists free crisis lines by country"

_CHANNELS = (EMERGENCY, "call", "text", "call or text", "chat")
_EU = frozenset(
    ("AT", "BE", "BG", "CY", "CZ", "DE", "DK", "EE", "ES", "FI", "FR", "GR", "HR", "HU", "IE", "IT", "LT", "LU", "LV",
     "MT", "NL", "PL", "PT", "RO", "SE", "SI", "SK")
)  # fmt: skip


@dataclass(frozen=True)
class Resource:
    """One service. country: ISO 3166-1 alpha-2, or EU. languages: ISO 639-1. verified_on: when last confirmed."""

    country: str
    name: str
    channel: str
    number: str
    hours: str
    languages: tuple[str, ...]
    source: str
    verified_on: datetime.date

    def line(self) -> str:
        """The service as a person reads it."""
        hours = "24 hours a day" if self.hours == "24/7" else self.hours
        return f"- {self.name}: {self.channel} {self.number} ({hours})"


class Resources(tuple[Resource, ...]):
    """Every known service."""

    def of(self, country: str) -> list[Resource]:
        """The services of a country; empty where none is known."""
        own = [resource for resource in self if resource.country == country]
        return own or [resource for resource in self if resource.country == "EU" and country in _EU]

    def emergency_number(self, country: str) -> str:
        """The number for emergencies, in words: `911`, or "your local emergency number" where it is not known."""
        return next((r.number for r in self.of(country) if r.channel == EMERGENCY), ANY_EMERGENCY_NUMBER)

    def lines(self, country: str) -> str:
        """The services to talk to, one per line, and where to find others."""
        own = [resource.line() for resource in self.of(country) if resource.channel != EMERGENCY]
        elsewhere = f"- In another country: {DIRECTORY}" if own else f"- {DIRECTORY}"
        return "\n".join([*own, elsewhere])

    def check_age(self, today: datetime.date) -> None:
        """Raise UserError if a service was confirmed more than MAX_AGE_DAYS ago, or after `today`."""
        old = [r for r in self if not 0 <= (today - r.verified_on).days <= MAX_AGE_DAYS]
        if old:
            named = ", ".join(f"{r.name} ({r.country}, {r.verified_on})" for r in old)
            raise UserError(
                f"{len(old)} of {len(self)} crisis services were not verified within {MAX_AGE_DAYS} days: {named}; "
                "confirm each at its source and set verified_on"
            )


def read_resources(path: Path = SHIPPED) -> Resources:
    """The services in a YAML file. Raises UserError for a file, a field or a value that is not as it must be."""
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the crisis services in {str(path)!r}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{str(path)!r} must be a list of services")
    return Resources(_resource(row, f"{path.name} row {number}") for number, row in enumerate(rows, start=1))


def _resource(row: Any, place: str) -> Resource:
    names = _field_names()
    if not isinstance(row, dict) or set(row) != set(names):
        given = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{place} has {given}; it must have exactly {', '.join(names)}")
    for name in set(names) - {"languages", "verified_on"}:
        if not isinstance(row[name], str) or not row[name]:
            raise UserError(f"{place}: {name} is {row[name]!r}; it must be text (quote a number)")
    if row["channel"] not in _CHANNELS:
        raise UserError(f"{place}: channel is {row['channel']!r}; allowed: {', '.join(_CHANNELS)}")
    if len(row["country"]) != 2 or not row["country"].isupper():
        raise UserError(f"{place}: country is {row['country']!r}; it must be two capital letters such as US")
    if not isinstance(row["verified_on"], datetime.date):
        raise UserError(f"{place}: verified_on is {row['verified_on']!r}; it must be a date such as 2026-11-27")
    languages: Sequence[Any] = row["languages"] if isinstance(row["languages"], list) else ()
    if not languages or not all(isinstance(language, str) for language in languages):
        raise UserError(f"{place}: languages is {row['languages']!r}; it must be a list such as [en, fr]")
    return Resource(**{**row, "languages": tuple(languages)})


@functools.cache
def _field_names() -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(Resource))
