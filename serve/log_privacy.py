"""What the server's log may say of a request: that something went wrong with it, and where, but never its words.

vLLM's modules that see requests put them into warnings and into the messages of exceptions: a chat template's complaint
quotes a role, a grammar's error quotes the grammar and what was written so far. Which of them do changes with each
version, so nothing that such a module fills into a warning is written down.
"""

import logging
import traceback
from typing import Any

_SEE_REQUESTS = (
    "vllm.entrypoints", "vllm.renderers", "vllm.parser", "vllm.tool_parsers", "vllm.reasoning", "vllm.sampling_params",
    "vllm.tokenizers", "vllm.multimodal", "vllm.v1.structured_output", "vllm.v1.core.sched", "vllm.v1.engine.async_llm",
    "vllm.v1.engine.input_processor", "vllm.v1.engine.output_processor", "vllm.v1.engine.detokenizer", "uvicorn",
)  # fmt: skip


def register() -> None:
    """Keep requests out of this process's log records, before any handler sees them.

    A `vllm.platform_plugins` entry point: the only plugins that vLLM loads first in each of its processes. Returning
    None leaves the choice of the platform to others.
    """
    make = logging.getLogRecordFactory()
    if getattr(make, "counsel", False):
        return

    def make_private(name: str | None, level: int | str, *rest: Any, **named: Any) -> logging.LogRecord:
        record = make(name, level, *rest, **named)
        # logging.makeLogRecord asks for one without name and level.
        if name and isinstance(level, int) and level >= logging.WARNING and name.startswith(_SEE_REQUESTS):
            _strip(record)
        return record

    make_private.counsel = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_private)


def _strip(record: logging.LogRecord) -> None:
    # The text as the program has it, with its gaps.
    record.args = ()
    if record.exc_info:
        kind, _, trace = record.exc_info
        frames = "".join(traceback.format_tb(trace)).rstrip()
        record.msg = f"{record.msg} ({kind.__name__ if kind else 'no exception'})\n{frames}"
        record.exc_info = None
