"""Keeps requests out of the server's log: it shows that a request failed and where, but never its words.

vLLM's modules that see requests put them into warnings and exception messages: a chat template's error quotes a role, a
grammar's error quotes the grammar and the answer so far. Which modules do this changes with each version, so every
value that such a module formats into a warning is dropped.
"""

import logging
import traceback
from typing import Any

_MODULES_THAT_SEE_REQUESTS = (
    "vllm.entrypoints", "vllm.renderers", "vllm.parser", "vllm.tool_parsers", "vllm.reasoning", "vllm.sampling_params",
    "vllm.tokenizers", "vllm.multimodal", "vllm.v1.structured_output", "vllm.v1.core.sched", "vllm.v1.engine.async_llm",
    "vllm.v1.engine.input_processor", "vllm.v1.engine.output_processor", "vllm.v1.engine.detokenizer", "uvicorn",
)  # fmt: skip


def register() -> None:
    """Strip requests from this process's log records before any handler sees them.

    An entry point of `vllm.platform_plugins`, the plugins that vLLM loads first in each of its processes. It returns
    None, so it does not choose a platform.
    """
    make = logging.getLogRecordFactory()
    if getattr(make, "counsel", False):
        return

    def make_private(name: str | None, level: int | str, *rest: Any, **named: Any) -> logging.LogRecord:
        record = make(name, level, *rest, **named)
        # logging.makeLogRecord passes no name and level.
        if name and isinstance(level, int) and level >= logging.WARNING and name.startswith(_MODULES_THAT_SEE_REQUESTS):
            _strip(record)
        return record

    make_private.counsel = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_private)


def _strip(record: logging.LogRecord) -> None:
    # The format string stays, with its placeholders unfilled.
    record.args = ()
    if record.exc_info:
        kind, _, trace = record.exc_info
        frames = "".join(traceback.format_tb(trace)).rstrip()
        record.msg = f"{record.msg} ({kind.__name__ if kind else 'no exception'})\n{frames}"
        record.exc_info = None
