"""What serve/grammars.py starts: compiles one grammar after another, each in a fork of its own with bounded means.

In, one JSON object a line: first `tokenizer`, `vocab_size`, `eos_token_id`, then `kind` and `spec`. Out, for each of
the latter, `fault`: "" or one line; or `failed`, where the machine kept it from knowing. It imports nothing of this
project and of vLLM, so that it starts in a moment.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import NoReturn

import llguidance

_MOST_CHARS = 300
_PR_SET_PDEATHSIG = 1
# How a fork says that it could not begin, and that it could not end within its memory.
_NO_MEANS, _TOO_LARGE = 2, 1
_TOO_MUCH = "the grammar is too large: compiling it takes more than {}; ask for shorter lists, texts or repetitions"


def main() -> None:
    """Serve until the input ends."""
    cpu_s, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    setting = json.loads(sys.stdin.readline())
    tokenizer = None
    if setting["tokenizer"] is not None:
        tokenizer = llguidance.LLTokenizer(
            setting["tokenizer"], n_vocab=setting["vocab_size"], eos_token=setting["eos_token_id"]
        )
    for line in sys.stdin:
        try:
            said = {"fault": _bounded(tokenizer, line, cpu_s, memory_mib)}
        except OSError as error:
            said = {"failed": str(error)}
        print(json.dumps(said), flush=True)


def _bounded(tokenizer: llguidance.LLTokenizer | None, line: str, cpu_s: float, memory_mib: int) -> str:
    """What is wrong with the grammar in `line`. Raises OSError where that is no fault of the grammar."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        try:
            child = os.fork()
            if child == 0:
                _compile(tokenizer, line, cpu_s, memory_mib, writer)
        finally:
            os.close(writer)
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status in (-signal.SIGKILL, _NO_MEANS):
        raise ChildProcessError(f"a grammar's compile ended with status {status}")
    if status == -signal.SIGPROF:
        return _TOO_MUCH.format(f"{cpu_s} s")
    return said.decode() if status == 0 else _TOO_MUCH.format(f"{memory_mib} MiB")


def _compile(
    tokenizer: llguidance.LLTokenizer | None, line: str, cpu_s: float, memory_mib: int, writer: int
) -> NoReturn:
    """The fork's whole life: what is wrong goes to `writer`, and how it ended is its status."""
    status = _NO_MEANS
    try:
        _let_go()
        bytes_now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Ended by the kernel, since no Python runs while it compiles.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        resource.setrlimit(resource.RLIMIT_AS, (bytes_now + (memory_mib << 20),) * 2)
        status = _TOO_LARGE
        os.write(writer, _fault(tokenizer, **json.loads(line)).encode(errors="replace"))
        status = 0
    finally:
        os._exit(status)


def _let_go() -> None:
    """A fork that hangs is to hold up nobody: it ends with its parent, and keeps none of its pipes open."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    # Of them the last, since where memory ends, Rust would say so in the server's log.
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)


def _fault(tokenizer: llguidance.LLTokenizer | None, kind: str, spec: str) -> str:
    """What the engine would find wrong, at its first token at the latest."""
    try:
        grammar = _grammar(kind, spec)
    except (ValueError, TypeError, RecursionError) as error:
        return _line(f"{kind} is no grammar: {type(error).__name__}: {error}")
    if tokenizer is None:
        fault = llguidance.LLMatcher.validate_grammar(grammar)
    else:
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        fault = matcher.get_error()
    return _line(f"{kind} is no grammar: {fault}") if fault else ""


def _grammar(kind: str, spec: str) -> str:
    """As vLLM's serialize_guidance_grammar, with the setting that serve/launch.py gives it (no free whitespace)."""
    if kind == "json":
        return _of_schema(spec)
    if kind == "json_object":
        return _of_schema('{"type": "object"}')
    if kind in ("regex", "grammar", "choice"):
        return str(llguidance.grammar_from(kind, spec))  # type: ignore[arg-type]
    # llguidance 1.7 reads what vLLM 0.32 makes of its schemas as a schema without rules: nothing would be held to.
    raise ValueError("structural tags are not kept to here; use json_schema, regex, choice or a Lark grammar")


def _of_schema(schema: str) -> str:
    return str(llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False}))


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]} ..."


if __name__ == "__main__":
    main()
