"""The texts that the crisis gate shows, filled in for a place, and how it recognizes them in a conversation."""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from counsel.errors import UserError
from counsel.safety.labels import RISKS
from counsel.safety.resources import Resources
from counsel.values import nearest

SHIPPED = Path(__file__).parent / "texts.yaml"
_PLACEHOLDERS = {"emergency", "resources"}
_MIN_LEAD_CHARS = 20
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")


@dataclass(frozen=True)
class Texts:
    """`templates`: what texts.yaml holds, by name; a policy's own file replaces some of it."""

    templates: Mapping[str, str]
    resources: Resources

    def render(self, name: str, country: str) -> str:
        """The text `name` for a country (ISO 3166-1 alpha-2; any other text counts as unknown)."""
        return self.templates[name].format(
            emergency=self.resources.emergency_number(country), resources=self.resources.lines(country)
        )

    def shown_before(self, assistant_turns: Sequence[str]) -> set[str]:
        """The risks whose text is in these turns, for whatever place it was written."""
        said = [_one_line(turn) for turn in assistant_turns]
        return {risk for risk in RISKS if any(_lead(self.templates[risk]) in turn for turn in said)}


def read_texts(own: Path | None, resources: Resources) -> Texts:
    """The shipped texts, with those of the YAML file `own` in their place.

    Raises UserError for an unknown name, an unknown placeholder, an imminent text that does not begin with the
    emergency number, or two texts that begin alike.
    """
    shipped = _read(SHIPPED)
    given = _read(own) if own is not None else {}
    for name, text in given.items():
        if name not in shipped:
            raise UserError(f"unknown text {name!r} in {str(own)!r}; {nearest(name, shipped)}")
        if unknown := _fields(text, name) - _PLACEHOLDERS:
            raise UserError(f"text {name!r} has {{{min(unknown)}}}; allowed: {{emergency}} and {{resources}}")
    templates = {**shipped, **given}
    for name in RISKS:
        missing = _PLACEHOLDERS - _fields(templates[name], name)
        if missing:
            raise UserError(f"text {name!r} lacks {{{min(missing)}}}; a text about a risk names whom to call")
    if not re.search(r"\{emergency\}.*\{resources\}", templates[RISKS[0]], re.DOTALL):
        raise UserError(f"text {RISKS[0]!r} must name {{emergency}} before {{resources}}")
    leads = [_lead(templates[name]) for name in RISKS]
    short = [name for name, lead in zip(RISKS, leads, strict=True) if len(lead) < _MIN_LEAD_CHARS or "{" in lead]
    if short:
        raise UserError(f"text {short[0]!r} must begin with a sentence of {_MIN_LEAD_CHARS} characters, all fixed")
    if len(set(leads)) < len(leads):
        raise UserError(f"the texts {', '.join(RISKS)} must each begin with a sentence of their own")
    return Texts(templates, resources)


def _read(path: Path) -> dict[str, str]:
    try:
        texts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the texts in {str(path)!r}: {error}") from error
    if not isinstance(texts, dict) or not all(isinstance(x, str) and x for pair in texts.items() for x in pair):
        raise UserError(f"{str(path)!r} must map names to texts")
    return texts


def _fields(text: str, name: str) -> set[str]:
    try:
        return {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    except ValueError as error:
        raise UserError(f"text {name!r} has an unmatched brace: {error}") from error


def _lead(text: str) -> str:
    """The first sentence, on one line."""
    return _one_line(_SENTENCE_END.split(text, maxsplit=1)[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())
