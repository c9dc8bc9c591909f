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
import difflib
import errno
import importlib
import io
import json
import os
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from counsel.errors import UserError
from counsel.values import Kind, bounds_text, convert, kinds, metavar, nearest

Schema = TypeVar("Schema")

MISSED, CANNOT_BE_JUDGED = 3, 4

FOLDERS = ("train", "serve", "eval", "loadtest")

# How the user started this process: `counsel` (also `python -m counsel`), or `python -m` and a folder's name.
_LAUNCHER = ContextVar("launcher", default="python -m")
_POSITIONAL = "positional"
# A run's config.json is a recipe too: JSON is YAML.
_CONFIG_FILES = (".yaml", ".yml", ".json")


class Result(NamedTuple):
    """A command's result: the JSON document for programs, the exit status, and a hint at the next step for people."""

    document: Mapping[str, Any]
    exit_status: int = 0
    next: str = ""


class Command(NamedTuple):
    """A config dataclass, the function that takes it, and one line of help.

    `config` and `run` may be given as `module:name`, which is imported when the command needs it.
    With `presets`, a folder, the YAML file is a positional argument: a path, or the stem of a file in that folder.
    """

    config: type | str
    run: Callable[[Any], Result] | str
    help: str
    presets: Path | None = None

    @property
    def schema(self) -> type:
        """The config dataclass, imported now where `config` is a reference."""
        return typing.cast(type, _imported(self.config))


def option(
    default: Any, help: str, *, group: str = "options", metavar: str = "", shown: str = "", flag: str = ""
) -> Any:
    """Declare a dataclass field that is a flag (`--field-name`) and a YAML key (`field_name`).

    Its type, choices and bounds are read from the annotation (see counsel/values.py). group: heading in `--help`.
    metavar: name of the value there. shown: the default as `--help` shows it, where the value alone is unclear.
    flag: the flag, where the field's name cannot be one (`--from`: a word of Python).
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "group": group, "metavar": metavar, "shown": shown, "flag": flag}
    )


def argument(help: str, default: Any = dataclasses.MISSING, *, shown: str = "") -> Any:
    """Declare a dataclass field that is a positional argument; optional when it has a default."""
    return dataclasses.field(default=default, metadata={"help": help, "shown": shown, _POSITIONAL: True})


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


def parse_arguments(
    program: str, commands: Mapping[str, Command], argv: Sequence[str]
) -> tuple[Command, type, dict[str, Any]]:
    """The command that `argv` names, its config class, and the flags as given. Exits with 2 on wrong usage."""
    words = list(argv)
    # A command's name may have two words; the first may be a command too: `fleet`, `fleet status`, `safety check`.
    n_words = next((n for n in (2, 1) if " ".join(words[:n]) in commands and len(words) >= n), 0)
    name, words = " ".join(words[:n_words]), words[n_words:]
    command = commands[name]
    schema = command.schema
    parser = _parser(program, name, commands, schema)
    if not words and command.presets is not None:
        parser.error(f"a recipe is needed; known: {', '.join(_shipped(command.presets))}, or a .yaml file")
    known, left_over = parser.parse_known_args(_with_dashed_values(words, schema))
    if wrong := _misspelled(getattr(known, "config", None), left_over, name, commands, schema):
        parser.error(wrong)
    return command, schema, vars(known)


def _main(program: str, commands: Mapping[str, Command], words: list[str]) -> int:
    command, schema, flags = parse_arguments(program, commands, words)
    json_wanted = flags.pop("json")

    def run() -> int:
        file = yaml_file(flags.pop("config", None), command.presets)
        config: Any = load_config(schema, file, flags)
        result: Result = _imported(command.run)(config)
        document = json.dumps(result.document, allow_nan=False)
        is_terminal = sys.stdout.isatty()
        # A document of 20 KB would push the table off a terminal's screen.
        if json_wanted or not is_terminal:
            print(document, flush=True)
        if result.next and is_terminal:
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


def _misspelled(
    recipe: str | None, left_over: Sequence[str], name: str, commands: Mapping[str, Command], schema: type
) -> str | None:
    """What is wrong with the recipe's name, or with the first argument that no option takes; None if nothing is."""
    command = commands[name]
    shipped = _shipped(command.presets)
    if shipped and recipe and recipe not in shipped and Path(recipe).suffix not in _CONFIG_FILES:
        others = [] if name else [key for key in commands if key]
        missing = "recipe" if name else "command or recipe"
        return f"no {missing} {recipe!r}, and not a .yaml file; {nearest(recipe, [*others, *shipped])}"
    if not left_over:
        return None
    word = left_over[0].partition("=")[0]
    if word.startswith("-"):
        close = difflib.get_close_matches(
            word, [flag_of(field) for field in dataclasses.fields(schema)], n=1, cutoff=0.6
        )
        return f"unknown option {word}" + (f"; did you mean {close[0]}?" if close else "")
    if not name and not shipped:
        return f"no command {word!r}; {nearest(word, [key for key in commands if key])}"
    return f"unexpected argument {word!r}"


def exit_status(run: Callable[[], int]) -> int:
    """What `run` returns; 1 after a UserError, which is printed as one line on stderr; 130 after Ctrl-C.

    141, as a shell has it, if nobody reads stdout any more, such as `head` after its last line.
    """
    for stream in (sys.stdout, sys.stderr):
        # Commands print what people wrote; under a locale without UTF-8 the first umlaut would end them.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    try:
        status = run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # What is left in the buffer has nowhere to go: Python would try once more as it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        print(as_typed(f"error: {error}"), file=sys.stderr)
        return 1
    except OSError as error:
        # A full or read-only disk, or missing permission: a traceback would explain nothing more.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}; free some space, or choose a folder that you "
              "may write to", file=sys.stderr)  # fmt: skip
        return 1
    except KeyboardInterrupt as stop:
        print(as_typed(str(stop)) or "stopped", file=sys.stderr)
        return 130


def load_config(schema: type[Schema], yaml_path: str | None, flags: Mapping[str, Any]) -> Schema:
    """Build `schema` from its defaults, then a YAML file, then `flags` (text values; None means not given).

    `schema.RENAMED`, if there is one, maps keys of earlier versions to their names now; the error for them lists all.
    Raises UserError for a missing or malformed file, an unknown key, or a value that the field cannot hold.
    """
    of_field = kinds(schema)
    given = {**(_read_yaml(Path(yaml_path)) if yaml_path else {}), **{k: v for k, v in flags.items() if v is not None}}
    known = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    values = {}
    renamed: Mapping[str, str] = getattr(schema, "RENAMED", {})
    if old := [f"{key} to {renamed[key]}" for key in given if key in renamed]:
        raise UserError(f"{yaml_path} is for an earlier version of Counsel Stack; in it, rename {', '.join(old)}")
    for key, value in given.items():
        if key not in known:
            raise UserError(f"unknown key {key!r} in {yaml_path}; {nearest(str(key), known)}")
        values[key] = convert(key, value, of_field[key])
    for key, field in known.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{key} is needed: {field.metadata['help']}")
    return schema(**values)


def yaml_file(given: str | None, presets: Path | None) -> str | None:
    """The YAML file that the command line names: a path, or a preset's stem."""
    if given is None or presets is None or Path(given).suffix in _CONFIG_FILES:
        return given
    return str(presets / f"{given}.yaml")


def _parser(program: str, name: str, commands: Mapping[str, Command], schema: type) -> argparse.ArgumentParser:
    prog = f"{_LAUNCHER.get()} {program} {name}".strip()
    command, fields, of_field = commands[name], dataclasses.fields(schema), kinds(schema)
    words = ["RECIPE"] if command.presets is not None else []
    words += [_word(field) for field in fields if field.metadata.get(_POSITIONAL)]
    usage, description = " ".join([prog, *words, "[options]"]), command.help
    if not name and len(commands) > 1:
        others = "\n".join(f"  {key:<16} {other.help}" for key, other in commands.items() if key)
        usage += f"\n       {prog} COMMAND ..."
        description += f"\n\nother commands ({prog} COMMAND --help lists their options):\n{others}"
    parser = OneLineErrors(
        prog=prog,
        usage=usage,
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    arguments = parser.add_argument_group("arguments")
    titles = dict.fromkeys(field.metadata["group"] for field in fields if "group" in field.metadata)
    groups = {title: parser.add_argument_group(title) for title in titles}
    if command.presets is not None:
        shipped = ", ".join(_shipped(command.presets))
        arguments.add_argument("config", metavar="RECIPE", nargs="?", help=f"YAML file, or one of: {shipped}")
    for field in fields:
        kind, text = of_field[field.name], _help_text(field, of_field[field.name])
        if field.metadata.get(_POSITIONAL):
            arguments.add_argument(field.name, metavar=field.name.upper(), nargs="?", help=text)
            continue
        group = groups[field.metadata["group"]]
        if kind.type is bool:
            group.add_argument(flag_of(field), action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            shown = field.metadata["metavar"] or metavar(field.name, kind)
            group.add_argument(flag_of(field), dest=field.name, metavar=shown, help=text)
    general = parser.add_argument_group("general")
    if command.presets is None and "config" not in of_field:
        general.add_argument("--config", metavar="FILE", help="YAML file with any of the options above as keys")
    general.add_argument("--json", action="store_true", help="print the JSON document on a terminal too")
    general.add_argument("-h", "--help", action="help", help="show this help and exit")
    return parser


def _word(field: dataclasses.Field[Any]) -> str:
    """A positional argument as the usage line shows it."""
    return field.name.upper() if field.default is dataclasses.MISSING else f"[{field.name.upper()}]"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Gives option names more room than argparse does."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The flag of a config field that is an option."""
    return field.metadata.get("flag") or f"--{field.name.replace('_', '-')}"


def _help_text(field: dataclasses.Field[Any], kind: Kind) -> str:
    """The field's help, then its default and bounds in brackets."""
    notes = [f"default: {default}"] if (default := field.metadata["shown"] or _shown(field.default)) else []
    if field.default is dataclasses.MISSING and not field.metadata.get(_POSITIONAL):
        notes.append("required")
    notes += [bounds] if (bounds := bounds_text(kind)) else []
    text = field.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
    return as_typed(text).replace("%", "%%")


def _shown(default: Any) -> str:
    """A default as `--help` shows it; empty where there is nothing to show."""
    if default is dataclasses.MISSING or default is None or default is False:
        return ""
    if default is True:
        return "on"
    if isinstance(default, float):
        return f"{default:g}"
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return textwrap.shorten(text, 60, placeholder=" ...")


def _with_dashed_values(words: Sequence[str], schema: type) -> list[str]:
    """`words`, with each text option joined to a value that looks like an option, as in `--vllm-args --seed`."""
    of_field = kinds(schema)
    by_flag = {flag_of(field): of_field[field.name] for field in dataclasses.fields(schema)}
    negated = [f"--no-{flag.removeprefix('--')}" for flag, kind in by_flag.items() if kind.type is bool]
    ours = {*by_flag, *negated, "--config", "--json", "--help", "-h"}
    joined: list[str] = []
    for word in words:
        last = by_flag.get(joined[-1]) if joined else None
        is_ours = word.partition("=")[0] in ours
        if last is not None and last.type is str and not last.many and word.startswith("-") and not is_ours:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice, as YAML demands; PyYAML would keep the last one."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys: list[Any] = []  # a list, since a key may be unhashable
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue  # a key beside `<<` may override a merged one
                key = self.construct_object(key_node, deep=True)
                if key in keys:
                    raise UserError(
                        f"{str(path)!r} line {key_node.start_mark.line + 1} gives {key!r} a second time; keep one"
                    )
                keys.append(key)
            return super().construct_mapping(node, deep)

    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"cannot read the config file {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise UserError(f"{str(path)!r} is not YAML: {reason}") from error
    if not isinstance(document, dict):
        raise UserError(f"{str(path)!r} holds {type(document).__name__}, not `key: value` lines")
    return document
