"""`python -m eval`: compare a base model and its adapters on questions that training never saw."""

import sys
from collections.abc import Sequence

from counsel import cli
from counsel.cli import Command
from eval.config import (
    BatchConfig,
    CompareConfig,
    DialogueConfig,
    EvalConfig,
    GateConfig,
    JudgeConfig,
    ReportConfig,
    SafetyAnswersConfig,
    SafetyConfig,
)

COMMANDS = {
    "": Command(
        EvalConfig, "eval.evaluate:evaluate", "ask base and adapters the held-out questions, score and compare them"
    ),
    "report": Command(ReportConfig, "eval.finish:report", "score and report an evaluation again from its rows"),
    "compare": Command(CompareConfig, "eval.compare:compare", "compare models from separate evaluations"),
    "gate": Command(GateConfig, "eval.gate:gate", "pass or fail an evaluation by rules on its intervals, for CI"),
    "judge": Command(
        JudgeConfig, "eval.judge.ask:judge", "let a model judge two arms' answers, and measure how far to trust it"
    ),
    "dialogue": Command(
        DialogueConfig,
        "eval.dialogue.command:dialogue",
        "let base and adapters talk with scripted people, turn by turn",
    ),
    "safety": Command(SafetyConfig, "eval.safety:safety", "measure crisis detection on labelled messages, for CI"),
    "safety answers": Command(
        SafetyAnswersConfig,
        "eval.safety_answers:safety_answers",
        "whether answers to people at risk refer and keep to the rules, with the crisis gate on and off",
    ),
    "batch": Command(BatchConfig, "eval.batch:batch", "answer an OpenAI Batch file, resuming after an interruption"),
}


def main(argv: Sequence[str] | None = None, launcher: str = "python -m") -> int:
    """Run one of COMMANDS; return the exit status."""
    return cli.main("eval", COMMANDS, argv, launcher)


if __name__ == "__main__":
    sys.exit(main())
