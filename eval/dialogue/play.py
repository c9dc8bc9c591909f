"""Let an arm talk with the people of personas.yaml, all dialogues of an arm at once, each turn after the last.

dialogues.jsonl: one finished dialogue per line
| key | meaning |
|---|---|
| `arm`, `persona`, `dialogue` | who talks with whom, and the number of the dialogue with that person: 0, 1, ... |
| `fact` | what the person says in turn 1 and asks for in turn 7 |
| `turns` | per turn: `state` (null if a model played the person), `person`, and the fields of samples.jsonl |
| `error` | null, or the error that ended it; such a dialogue is counted, never scored, and talked again |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import openai

from counsel.chat import Message, with_system
from counsel.client import ServerModels
from eval.arms import Arm
from eval.ask import sample_fields
from eval.config import DialogueConfig
from eval.dialogue.person import OPENING, RECALL, RECALL_TURN, TURNS, Persona, personas
from eval.requests import Outcome, Progress, attempt, run_bounded
from eval.samples import Key, Row, RowLog

DIALOGUE_KEY = ("arm", "persona", "dialogue")
# A person says a few sentences.
_PERSON_TOKENS = 120
_PART = (
    "You play a person in a written conversation. {about}\nThe conversation so far:\n\n{transcript}\n\nWrite what the "
    "person says next: one to three plain sentences, as that person, without a name in front or quotation marks."
)


def planned_dialogues(arm: str, n: int) -> list[Key]:
    """The `DIALOGUE_KEY`s of an arm's n dialogues; the people take turns."""
    people = personas()
    return [(arm, people[at % len(people)].id, at // len(people)) for at in range(n)]


@dataclass(frozen=True)
class Talks:
    """Talks with one server, and appends a row to `log` per dialogue.

    person: None where the script plays it alone. progress: counts turns.
    """

    client: openai.AsyncOpenAI
    person: openai.AsyncOpenAI | None
    server_models: ServerModels
    system: str
    config: DialogueConfig
    log: RowLog
    progress: Progress

    async def talk(self, arm: Arm) -> None:
        """Append the dialogues of one arm that the log lacks."""
        by_id = {persona.id: persona for persona in personas()}
        jobs = [
            partial(self._dialogue, arm, by_id[persona], number)
            for _, persona, number in planned_dialogues(arm.name, self.config.dialogues)
            if (arm.name, persona, number) not in self.log.done
        ]
        await run_bounded(jobs, self.config.concurrency)

    async def _dialogue(self, arm: Arm, persona: Persona, number: int) -> None:
        turns: list[Row] = []
        error, state = None, OPENING
        for turn in range(1, TURNS + 1):
            # The opening and the question for its fact are always the script's.
            scripted = self.person is None or turn in (1, RECALL_TURN)
            if self.person is None or turn == 1:
                state = persona.states[state].after(turns[-1]["text"]) if turns else OPENING
            elif turn == RECALL_TURN:
                state = RECALL
            seed = self.config.seed + TURNS * number + turn - 1
            said = persona.line(state, number)
            if self.person is not None and not scripted:
                reply = sample_fields(await self._played(self.person, persona, turns, seed))
                said, error = (
                    reply["text"],
                    reply["error"] or (None if reply["text"] else "the person's model is silent"),
                )
                if error is not None:
                    error = f"the person, turn {turn}: {error}"
                    break
            history: list[Message] = [
                message
                for past in turns
                for message in (
                    {"role": "user", "content": past["person"]},
                    {"role": "assistant", "content": past["text"]},
                )
            ]
            outcome = await self._answer(arm, [*history, {"role": "user", "content": said}], seed)
            fields = sample_fields(outcome)
            turns.append({"state": state if scripted else None, "person": said, **fields})
            self.progress.step(arm.name)
            if fields["error"] is not None:
                error = f"turn {turn}: {fields['error']}"
                break
        row: Row = {"arm": arm.name, "persona": persona.id, "dialogue": number, "fact": persona.fact(number)}
        self.log.append(row | {"turns": turns, "error": error})

    async def _answer(self, arm: Arm, messages: Sequence[Message], seed: int) -> Outcome:
        return await attempt(
            lambda: self.client.chat.completions.create(
                model=self.server_models.exact(arm.model),
                messages=with_system(messages, self.system),  # type: ignore[arg-type]
                max_tokens=self.config.max_tokens,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                seed=seed,
            )
        )

    async def _played(self, person: openai.AsyncOpenAI, persona: Persona, turns: Sequence[Row], seed: int) -> Outcome:
        """What a model says in the person's place; it reads the dialogue as one text, so any chat template takes it."""
        transcript = "\n".join(f"Person: {turn['person']}\nPartner: {turn['text']}" for turn in turns)
        part: Any = {"role": "user", "content": _PART.format(about=persona.about, transcript=transcript)}
        return await attempt(
            lambda: person.chat.completions.create(
                model=self.config.person_model,
                messages=[part],
                max_tokens=_PERSON_TOKENS,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                seed=seed,
            )
        )
