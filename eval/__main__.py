"""`python -m eval`: compare a base model and its adapters on questions that training never saw."""

import sys

from counsel.cli import Command, Result, main
from eval.config import BatchConfig, CompareConfig, EvalConfig, GateConfig, JudgeConfig, ReportConfig


def _evaluate(config: EvalConfig) -> Result:
    from eval.evaluate import evaluate

    return evaluate(config)


def _report(config: ReportConfig) -> Result:
    from eval.evaluate import report

    return report(config)


def _compare(config: CompareConfig) -> Result:
    from eval.compare import compare

    return compare(config)


def _gate(config: GateConfig) -> Result:
    from eval.gate import gate

    return gate(config)


def _judge(config: JudgeConfig) -> Result:
    from eval.judge.ask import judge

    return judge(config)


def _batch(config: BatchConfig) -> Result:
    from eval.batch import batch

    return batch(config)


COMMANDS = {
    "": Command(EvalConfig, _evaluate, "ask base and adapters every held-out question, score and compare them"),
    "report": Command(ReportConfig, _report, "score and report an evaluation again, from its rows"),
    "compare": Command(CompareConfig, _compare, "compare models that were evaluated apart"),
    "gate": Command(GateConfig, _gate, "pass or fail an evaluation by rules on its intervals, for CI"),
    "judge": Command(JudgeConfig, _judge, "let a model judge two arms' answers, and say how far to trust it"),
    "batch": Command(BatchConfig, _batch, "answer an OpenAI Batch file, continuing where a killed one stopped"),
}

if __name__ == "__main__":
    sys.exit(main("eval", COMMANDS))
