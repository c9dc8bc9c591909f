"""The child of serve/grammars.py: compiles grammars one after the other, each in a fork with bounded time and memory.

It reads one JSON object per line: first `tokenizer`, `vocab_size`, `eos_token_id`, then `kind` and `spec` for each
grammar. For each grammar it writes `problem`, "" or one line, or `failed` if the machine made the check fail. To start
quickly, it imports neither this project nor vLLM.
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

_MAX_CHARS = 300
_PR_SET_PDEATHSIG = 1
# Exit status of a fork that could not begin, and of one that ran out of memory.
_NOT_STARTED, _OUT_OF_MEMORY = 2, 1
_TOO_LARGE = "the grammar is too large: compiling it takes more than {}; ask for shorter lists, strings or repetitions"


def main() -> None:
    """Check grammars until the input ends."""
    cpu_s, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    setup = json.loads(sys.stdin.readline())
    tokenizer = None
    if setup["tokenizer"] is not None:
        tokenizer = llguidance.LLTokenizer(
            setup["tokenizer"], n_vocab=setup["vocab_size"], eos_token=setup["eos_token_id"]
        )
    for line in sys.stdin:
        try:
            answer = {"problem": _compile_bounded(tokenizer, line, cpu_s, memory_mib)}
        except OSError as error:
            answer = {"failed": str(error)}
        print(json.dumps(answer), flush=True)


def _compile_bounded(tokenizer: llguidance.LLTokenizer | None, line: str, cpu_s: float, memory_mib: int) -> str:
    """What is wrong with the grammar in `line`. Raises OSError if the machine made the check fail."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        try:
            child = os.fork()
            if child == 0:
                _run_fork(tokenizer, line, cpu_s, memory_mib, writer)
        finally:
            os.close(writer)
        problem = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status in (-signal.SIGKILL, _NOT_STARTED):
        raise ChildProcessError(f"the fork that compiles a grammar exited with status {status}")
    if status == -signal.SIGPROF:
        return _TOO_LARGE.format(f"{cpu_s} s")
    return problem.decode() if status == 0 else _TOO_LARGE.format(f"{memory_mib} MiB")


def _run_fork(
    tokenizer: llguidance.LLTokenizer | None, line: str, cpu_s: float, memory_mib: int, writer: int
) -> NoReturn:
    """Everything the fork does: it writes the problem to `writer` and reports by its exit status how it ended."""
    status = _NOT_STARTED
    try:
        _detach()
        bytes_now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # The kernel ends it, because no Python runs during a compile.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        resource.setrlimit(resource.RLIMIT_AS, (bytes_now + (memory_mib << 20),) * 2)
        status = _OUT_OF_MEMORY
        os.write(writer, _problem(tokenizer, **json.loads(line)).encode(errors="replace"))
        status = 0
    finally:
        os._exit(status)


def _detach() -> None:
    """Make a fork that hangs harmless: it ends with its parent, and keeps none of its pipes open."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    # Standard error too, because Rust reports a lack of memory there, which is the server's log.
    for stream in (0, 1, 2):
        os.dup2(null, stream)


def _problem(tokenizer: llguidance.LLTokenizer | None, kind: str, spec: str) -> str:
    """What the engine would find wrong, at the first token at the latest."""
    try:
        grammar = _grammar(kind, spec)
    except (ValueError, TypeError, RecursionError) as error:
        return _one_line(f"{kind} is not a valid grammar: {type(error).__name__}: {error}")
    if tokenizer is None:
        problem = llguidance.LLMatcher.validate_grammar(grammar)
    else:
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        problem = matcher.get_error()
    return _one_line(f"{kind} is not a valid grammar: {problem}") if problem else ""


def _grammar(kind: str, spec: str) -> str:
    """As vLLM's serialize_guidance_grammar, with the setting from serve/launch.py: no optional whitespace."""
    if kind == "json":
        return _schema_grammar(spec)
    if kind == "json_object":
        return _schema_grammar('{"type": "object"}')
    if kind in ("regex", "grammar", "choice"):
        return str(llguidance.grammar_from(kind, spec))  # type: ignore[arg-type]
    # vLLM 0.32 writes their schemas in a form that llguidance 1.7 reads as a schema without rules.
    raise ValueError("structural tags are not enforced here; use json_schema, regex, choice or a Lark grammar")


def _schema_grammar(schema: str) -> str:
    return str(llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False}))


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} ..."


if __name__ == "__main__":
    main()
