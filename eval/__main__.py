"""`python -m eval`: compare a base model and its adapters on questions that training never saw."""

import sys

from eval.config import EvalConfig, ReportConfig
from train.command import Command, Result, main


def _evaluate(config: EvalConfig) -> Result:
    from eval.evaluate import evaluate

    return evaluate(config)


def _report(config: ReportConfig) -> Result:
    from eval.evaluate import report

    return report(config)


COMMANDS = {
    "": Command(EvalConfig, _evaluate, "ask base and adapters every held-out question, score and compare them"),
    "report": Command(ReportConfig, _report, "score and report an evaluation again, from its rows"),
}

if __name__ == "__main__":
    sys.exit(main("eval", COMMANDS))
