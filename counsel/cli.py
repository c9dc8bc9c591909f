"""One frozen dataclass is the schema of a command: its flags, its YAML keys and its --help.

Each folder's `__main__` declares its commands and calls `main`. Every command keeps this contract:

- precedence: dataclass defaults < YAML file (`--config`) < flags; the error for an unknown key names the nearest key;
- stdout carries results; its last line is one JSON document, unless stdout is a terminal and `--json` is not given;
- progress goes to stderr; on a terminal its last line says what to do next;
- exit status 0 done, 1 expected failure (one `error:` line), 2 usage; commands that judge add 3 (missed) and 4 (cannot
  be judged).

    @dataclass(frozen=True)
    class Greeting:
        name: str = argument("who to greet")
        times: int = option(1, "how often")

    main("greet", {"": Command(Greeting, greet, "say hello")})
"""

import argparse
import dataclasses
import datetime
import difflib
import errno
import importlib
import io
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from counsel.errors import UserError

Schema = TypeVar("Schema")

MISSED, CANNOT_BE_JUDGED = 3, 4

FOLDERS = ("train", "serve", "eval", "loadtest")

# How the user started this process: `counsel` (also `python -m counsel`), or `python -m` and a folder's name.
_LAUNCHER = ContextVar("launcher", default="python -m")
_POSITIONAL = "positional"
# A run's config.json is a recipe too: JSON is YAML.
_CONFIG_FILES = (".yaml", ".yml", ".json")
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


class Result(NamedTuple):
    """What a command leaves: the JSON document for programs, the exit status, and what a person may do next."""

    document: Mapping[str, Any]
    exit_status: int = 0
    next: str = ""


class Command(NamedTuple):
    """A config dataclass, the function that takes it, and one line of help.

    Either may be `module:name` instead, which is imported only when the command runs or shows its help.
    With `presets`, a folder, the YAML file is a positional argument: a path, or the stem of a file in that folder.
    """

    config: type | str
    run: Callable[[Any], Result] | str
    help: str
    presets: Path | None = None


def option(default: Any, help: str) -> Any:
    """Declare a dataclass field that is a flag (`--field-name`) and a YAML key (`field_name`)."""
    return dataclasses.field(default=default, metadata={"help": help})


def argument(help: str, default: Any = dataclasses.MISSING) -> Any:
    """Declare a dataclass field that is given by position; optional when it has a default."""
    return dataclasses.field(default=default, metadata={"help": help, _POSITIONAL: True})


def main(
    program: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None, launcher: str = "python -m"
) -> int:
    """Run the command that `argv` names, or the one under the key `""`; return the exit status.

    Usage, errors and hints name commands as the user started this one: `python -m serve` or `counsel serve`.
    """
    token = _LAUNCHER.set(launcher)
    try:
        return _main(program, commands, list(sys.argv[1:] if argv is None else argv))
    finally:
        _LAUNCHER.reset(token)


def as_typed(message: str) -> str:
    """`message` with each `python -m serve` (or another folder) written the way the user started this process."""
    return re.sub(rf"\bpython -m (?=(?:{'|'.join(FOLDERS)})\b(?!\.))", f"{_LAUNCHER.get()} ", message)


def _main(program: str, commands: Mapping[str, Command], words: list[str]) -> int:
    name = words.pop(0) if words and words[0] in commands else ""
    command = commands[name]
    schema = _imported(command.config)
    parser = _parser(program, name, commands, schema)
    if not words and command.presets is not None:
        parser.error(f"a recipe is needed; known: {', '.join(_shipped(command.presets))}, or a .yaml file")
    known, left_over = parser.parse_known_args(_with_dashed_values(words, schema))
    if wrong := _misspelt(getattr(known, "config", None), left_over, name, commands, schema):
        parser.error(wrong)
    flags = vars(known)
    json_wanted = flags.pop("json")

    def run() -> int:
        file = _yaml_file(flags.pop("config", None), command.presets)
        config: Any = load_config(schema, file, flags)
        result = _imported(command.run)(config)
        document = json.dumps(result.document, allow_nan=False)
        person = sys.stdout.isatty()
        # A document of 20 KB would push the table that a person came for off the screen.
        if json_wanted or not person:
            print(document, flush=True)
        if result.next and person:
            print(as_typed(f"next: {result.next}"), file=sys.stderr)
        return result.exit_status

    return exit_status(run)


def _imported(reference: Any) -> Any:
    """What `module:name` refers to; anything but a string as it is."""
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


class OneLineErrors(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the list of all options."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def _shipped(presets: Path | None) -> list[str]:
    return sorted(path.stem for path in presets.glob("*.yaml")) if presets else []


def _misspelt(
    recipe: str | None, left_over: Sequence[str], name: str, commands: Mapping[str, Command], schema: type
) -> str | None:
    """What is wrong with a word in a recipe's place, or with words that no option takes, and what was meant perhaps."""
    command = commands[name]
    shipped = _shipped(command.presets)
    if shipped and recipe and recipe not in shipped and Path(recipe).suffix not in _CONFIG_FILES:
        others = [] if name else [key for key in commands if key]
        kinds = "recipe" if name else "command or recipe"
        return f"no {kinds} {recipe!r}; {nearest(recipe, [*others, *shipped])}, or give a .yaml file"
    if not left_over:
        return None
    word = left_over[0].partition("=")[0]
    if word.startswith("-"):
        options = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(schema)]
        close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
        return f"unknown option {word}" + (f"; did you mean {close[0]}?" if close else "")
    if not name and not shipped:
        return f"no command {word!r}; {nearest(word, [key for key in commands if key])}"
    return f"{word!r} is one word too many"


def exit_status(run: Callable[[], int]) -> int:
    """What `run` returns; 1 after a UserError, said in one line on stderr, and 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # What people wrote is printed, and a locale without UTF-8 would end the command at its first umlaut.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    try:
        return run()
    except UserError as error:
        print(as_typed(f"error: {error}"), file=sys.stderr)
        return 1
    except OSError as error:
        # Full, read-only or closed to this account: nothing that a traceback would explain better.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}; free some space, or choose a place that may be "
              "written", file=sys.stderr)  # fmt: skip
        return 1
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 130


def load_config(schema: type[Schema], yaml_path: str | None, flags: Mapping[str, Any]) -> Schema:
    """Build `schema` from its defaults, then a YAML file, then `flags` (text values; a None means not given).

    Raises UserError for a missing or malformed file, an unknown key, or a value of the wrong type.
    """
    given = {**(_read_yaml(Path(yaml_path)) if yaml_path else {}), **{k: v for k, v in flags.items() if v is not None}}
    known = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(schema)
    values = {}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"unknown key {key!r} in {yaml_path}; {nearest(str(key), known)}")
        values[key] = _convert(key, value, hints[key])
    for key, field in known.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{key} is needed: {field.metadata['help']}")
    return schema(**values)


def _yaml_file(given: str | None, presets: Path | None) -> str | None:
    """The YAML file that a word on the command line names: a path, or a preset's stem."""
    if given is None or presets is None or Path(given).suffix in _CONFIG_FILES:
        return given
    return str(presets / f"{given}.yaml")


def nearest(word: str, allowed: Sequence[str] | Mapping[str, Any]) -> str:
    """Say which allowed word `word` may have meant, or list them all."""
    close = difflib.get_close_matches(word, list(allowed), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(sorted(allowed))}"


def _parser(program: str, name: str, commands: Mapping[str, Command], schema: type) -> argparse.ArgumentParser:
    others = "\n".join(f"  {key:<14} {command.help}" for key, command in commands.items() if key)
    parser = OneLineErrors(
        prog=f"{_LAUNCHER.get()} {program} {name}".strip(),
        description=commands[name].help,
        epilog=f"other commands (each has its own --help):\n{others}" if others and not name else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fields = dataclasses.fields(schema)
    presets = commands[name].presets
    if presets is not None:
        shipped = ", ".join(_shipped(presets))
        parser.add_argument("config", metavar="RECIPE", nargs="?", help=f"YAML file, or one of: {shipped}")
    elif not any(field.name == "config" for field in fields):
        parser.add_argument("--config", metavar="FILE", help="YAML file with any of the options below")
    parser.add_argument("--json", action="store_true", help="end with the JSON document on a terminal too")
    hints = typing.get_type_hints(schema)
    for field in fields:
        text = as_typed(field.metadata["help"]).replace("%", "%%")
        if field.default not in (dataclasses.MISSING, None, ""):
            text += f" (default: {_shown(field.default)})"
        if field.metadata.get(_POSITIONAL):
            parser.add_argument(field.name, nargs="?", help=text)
        elif hints[field.name] is bool:
            flag = f"--{field.name.replace('_', '-')}"
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(f"--{field.name.replace('_', '-')}", metavar="X", help=text)
    return parser


def _with_dashed_values(words: Sequence[str], config: type) -> list[str]:
    """The same words, with a text option and a value that looks like one joined: `--vllm-args --seed` is no mistake."""
    hints = typing.get_type_hints(config)
    flags = {f"--{name.replace('_', '-')}": name for name in hints}
    joined: list[str] = []
    for word in words:
        last = flags.get(joined[-1]) if joined else None
        ours = word.partition("=")[0] in (*flags, "--config", "--json", "--help", "-h") or word.startswith("--no-")
        if last is not None and hints[last] is str and word.startswith("-") and not ours:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """A mapping's keys are given once: YAML says so, and PyYAML lets the last one win."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: list[Any] = []
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue  # keys that are merged in may be given again: that is what merging is for
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise UserError(
                        f"{str(path)!r} line {key_node.start_mark.line + 1} gives {key!r} a second time; keep one"
                    )
                seen.append(key)
            return super().construct_mapping(node, deep)

    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"cannot read the config file {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise UserError(f"{str(path)!r} holds {type(document).__name__}, not `key: value` lines")
    return document


def _convert(key: str, value: Any, hint: Any) -> Any:
    """Turn a flag's text or a YAML value into the type of its field."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None or value == "none":
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    try:
        if typing.get_origin(hint) is tuple:
            parts = (
                value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
            )
            return tuple(_convert(key, part, typing.get_args(hint)[0]) for part in parts)
        if hint is bool:
            word = str(value).lower()
            if word not in _TRUE | _FALSE:
                raise ValueError
            return word in _TRUE
        if hint is str:
            return _text(value)
        if isinstance(value, bool) or not math.isfinite(number := float(value)):
            raise ValueError
        if hint is int and number != int(number):
            raise ValueError
        return int(value if isinstance(value, int) else number) if hint is int else number
    except (TypeError, ValueError, OverflowError) as error:
        wanted = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}[hint]
        wanted = f"one {wanted.removeprefix('a ')}, not a list" if isinstance(value, list) else wanted
        given = "empty (null)" if value is None else repr(value)
        advice = "; in YAML put it in quotes" if hint is str and isinstance(value, int | float | datetime.date) else ""
        raise UserError(f"{key} is {given}; it must be {wanted}{advice}") from error


def _text(value: Any) -> str:
    """Text as it was given. A number, a date or a list may have been read out of what was meant as text."""
    if not isinstance(value, str):
        raise TypeError
    value.encode("utf-8")  # a half surrogate, or bytes of another encoding on the command line, breaks later
    return value
