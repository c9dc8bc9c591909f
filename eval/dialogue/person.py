"""The scripted people: personas.yaml, read and checked, and the state machine that talks."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from eval.dialogue.features import FEATURES, OTHERWISE
from eval.text_stats import words

PERSONAS = Path(__file__).with_name("personas.yaml")
TURNS = 8
OPENING, RECALL, END = "opening", "recall", "end"
# The turn at which every script asks for the fact of turn 1.
RECALL_TURN = 7


class State(NamedTuple):
    """What the person says, and the next state by what the answer shows, in the order of the file."""

    says: str
    following: Mapping[str, str]

    def after(self, answer: str) -> str:
        """The name of the state that follows this answer."""
        return next(
            name for feature, name in self.following.items() if feature == OTHERWISE or FEATURES[feature](answer)
        )


class Persona(NamedTuple):
    """One person of personas.yaml, where the fields are described."""

    id: str
    topic: str
    about: str
    facts: tuple[str, ...]
    states: Mapping[str, State]

    def fact(self, dialogue: int) -> str:
        """The fact of a dialogue by its number; the facts take turns."""
        return self.facts[dialogue % len(self.facts)]

    def line(self, state: str, dialogue: int) -> str:
        """What the person says in this state of a dialogue."""
        return self.states[state].says.replace("{fact}", self.fact(dialogue))


@cache
def personas() -> tuple[Persona, ...]:
    """The shipped people. Raises ValueError where one breaks a rule of the file."""
    import yaml

    people = tuple(map(_persona, yaml.safe_load(PERSONAS.read_text(encoding="utf-8"))))
    for person in people:
        _check(person)
    return people


def remembers(answer: str, fact: str) -> bool:
    """Whether an answer has the fact, as a whole word and in any case."""
    return fact.lower() in words(answer)


def paths(persona: Persona, state: str = OPENING) -> Iterator[list[str]]:
    """Every way through the states, from `state` to the end."""
    if state == END:
        yield []
        return
    for following in dict.fromkeys(persona.states[state].following.values()):
        for rest in paths(persona, following):
            yield [state, *rest]


def _persona(entry: Mapping[str, Any]) -> Persona:
    states = {
        name: State(says, {OTHERWISE: following} if isinstance(following, str) else following)
        for name, (says, following) in entry["states"].items()
    }
    return Persona(entry["id"], entry["topic"], entry["about"], tuple(entry["facts"]), states)


def _check(person: Persona) -> None:
    for state in person.states.values():
        unknown = set(state.following) - {*FEATURES, OTHERWISE}
        if unknown or list(state.following)[-1] != OTHERWISE:
            raise ValueError(f"{person.id}: {list(state.following)}; use {', '.join(FEATURES)}, and {OTHERWISE} last")
    for path in paths(person):
        if len(path) != TURNS or path[RECALL_TURN - 1] != RECALL:
            raise ValueError(f"{person.id}: {path} must have {TURNS} turns, with {RECALL} as turn {RECALL_TURN}")
    said = " ".join(state.says for state in person.states.values()) + person.about
    if said.count("{fact}") != 1 or any(remembers(said, fact) for fact in person.facts):
        raise ValueError(f"{person.id}: the fact must be in the opening alone")
