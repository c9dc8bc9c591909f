"""The contract every command keeps: precedence, one-line errors, exit status, last JSON line."""

import dataclasses
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

import counsel.__main__
from counsel.cli import FOLDERS, Command, Result, argument, load_config, main, option
from counsel.errors import UserError
from counsel.values import NonNegativeFloat, PositiveFloat, PositiveInt, Seed, ShareBelowOne, check_bounds
from tests.test_layout import HEAVY, ROOT


@dataclass(frozen=True)
class Greeting:
    name: str = argument("who to greet")
    times: int = option(1, "how often")
    warmth: float = option(0.5, "0 to 1")
    tags: tuple[str, ...] = option((), "labels")
    limit: int | None = option(None, "a bound, or none")
    loud: bool = option(False, "in capitals")


def greet(config: Greeting) -> Result:
    if config.name == "nobody":
        raise UserError("name is 'nobody'; name a person")
    print("hello " * config.times)
    return Result({"greeted": config.name, "tags": list(config.tags)}, exit_status=3 if config.loud else 0)


COMMANDS = {"": Command(Greeting, greet, "say hello"), "again": Command(Greeting, greet, "say it again")}


def test_last_line_of_stdout_is_json(capsys):
    """Results end in one JSON document, whatever was printed before."""
    assert main("greet", COMMANDS, ["ada", "--times", "2", "--tags", "a,b"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"greeted": "ada", "tags": ["a", "b"]}


def test_a_terminal_gets_no_json_document(monkeypatch, capsys):
    """On a terminal the document is printed only with --json."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    assert main("greet", COMMANDS, ["ada"]) == 0
    assert capsys.readouterr().out == "hello \n"
    assert main("greet", COMMANDS, ["ada", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["greeted"] == "ada"


def test_the_next_step_is_printed_on_a_terminal(monkeypatch, capsys):
    """Programs that read the document get no hint."""
    commands = {"": Command(Greeting, lambda config: Result({}, next=f"wave to {config.name}"), "say hello")}

    assert main("greet", commands, ["ada"]) == 0
    assert capsys.readouterr() == ("{}\n", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main("greet", commands, ["ada"]) == 0
    assert capsys.readouterr() == ("", "next: wave to ada\n")


def test_flags_beat_yaml_and_yaml_beats_defaults(tmp_path):
    """Precedence is defaults, then YAML, then flags."""
    file = tmp_path / "g.yaml"
    file.write_text("name: ada\ntimes: 4\nwarmth: 1e-1\nlimit: null\ntags: [x, y]\n")

    config = load_config(Greeting, str(file), {"times": "7", "loud": None})

    assert config == Greeting("ada", times=7, warmth=0.1, tags=("x", "y"), limit=None, loud=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ntime: 2", "unknown key 'time'"),
        ("name: a\ntime: 2", "did you mean 'times'"),
        ("name: a\ntimes: two", "times is 'two'; it must be a whole number"),
        ("name: a\ntimes: 2.5", "it must be a whole number"),
        ("name: a\nloud: perhaps", "true or false"),
        ("times: 2", "name is needed: who to greet"),
        ("- a\n- b", "holds list"),
        ("a: [", "is not YAML"),
        ("on: 1", "unknown key True"),
        # Of two values under one key the last would win, and a value of another kind would become text.
        ("name: a\ntimes: 2\nwarmth: 1\ntimes: 3", "line 4 gives 'times' a second time; keep one"),
        ("name:", r"name is empty \(null\); it must be text"),
        ("name: null", r"name is empty \(null\); it must be text"),
        ("name: 7", "name is 7; it must be text; in YAML put it in quotes"),
        ("name: on", "name is True; it must be text; in YAML put it in quotes"),
        ("name: 2026-01-01", "it must be text; in YAML put it in quotes"),
        ("name: [a, b]", "it must be text, not a list"),
        ("name: {a: b}", "it must be text"),
        ('name: "half \\ud83d"', "it must be text"),
        ("name: a\ntimes:", r"times is empty \(null\); it must be a whole number"),
        ("name: a\ntimes: [1]", "it must be a whole number, not a list"),
        ("name: a\ntimes: 1.0e+400", "it must be a whole number"),
        ("name: a\nwarmth: .inf", "warmth is inf; it must be a finite number"),
        ("name: a\nwarmth: -.inf", "it must be a finite number"),
        ("name: a\nwarmth: .nan", "it must be a finite number"),
        ("name: a\nwarmth: 1e999", "it must be a finite number"),
        ("name: a\nwarmth: true", "it must be a finite number"),
        ("name: a\ntags: {a: b}", "tags is {'a': 'b'}; it must be text"),
        ("name: a\ntags: [1]", "tags is 1; it must be text"),
        ("name: a\ntags:", r"tags is empty \(null\); it must be text"),
    ],
)
def test_bad_yaml_is_one_clear_line(tmp_path, text, message):
    """The error for a bad config file says in one line what is wrong."""
    file = tmp_path / "g.yaml"
    file.write_text(text)

    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("{", r"\{")) as caught:
        load_config(Greeting, str(file), {})
    assert "\n" not in str(caught.value)


def test_a_list_of_one_may_be_given_plainly(tmp_path):
    """`tags: x` and `--tags x` are one tag."""
    file = tmp_path / "g.yaml"
    file.write_text("name: ada\ntags: x\n")
    assert load_config(Greeting, str(file), {}).tags == ("x",)


def test_yaml_may_merge_a_mapping_and_change_a_key_of_it(tmp_path):
    """A key beside `<<` overrides the merged one; it is not a duplicate."""
    file = tmp_path / "g.yaml"
    file.write_text("<<: {name: ada, times: 2}\ntimes: 3\n")
    assert load_config(Greeting, str(file), {}) == Greeting("ada", times=3)


def test_text_that_is_not_utf_8_is_refused():
    """An argument in another encoding would otherwise fail when it is first written, perhaps hours later."""
    with pytest.raises(UserError, match=r"name is .*; it must be text"):
        load_config(Greeting, None, {"name": b"gr\xfc\xdfe".decode("utf-8", "surrogateescape")})


def test_expected_failure_exits_1_with_one_line(capsys):
    """A UserError is one `error:` line on stderr and exit status 1; stdout stays empty."""
    assert main("greet", COMMANDS, ["nobody"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: name is 'nobody'; name a person\n"
    assert captured.out == ""


def test_result_sets_exit_status_and_subcommand_is_found(capsys):
    """A command may end with its own exit status; the first word picks the sub-command."""
    assert main("greet", COMMANDS, ["again", "ada", "--loud"]) == 3


def test_unknown_flag_is_a_usage_error():
    """Exit status 2, as argparse has it."""
    with pytest.raises(SystemExit) as stop:
        main("greet", COMMANDS, ["ada", "--lod"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["--extra", "--seed"], "--seed"),
        (["--extra", "--seed 3 --fast"], "--seed 3 --fast"),
        (["--extra=--seed"], "--seed"),
        (["--extra", "-O3", "--loud"], "-O3"),
        (["--extra", "--no-seed"], "--no-seed"),
    ],
)
def test_a_text_value_may_begin_with_a_dash(words, extra, capsys):
    """Flags for another program may follow a space or an equals sign."""

    @dataclass(frozen=True)
    class Passing:
        extra: str = option("", "flags for another program")
        loud: bool = option(False, "in capitals")

    run = Command(Passing, lambda config: Result({"extra": config.extra}), "pass it on")
    assert main("pass", {"": run}, words) == 0
    assert json.loads(capsys.readouterr().out) == {"extra": extra}


@pytest.mark.parametrize("word", ["--loud", "--no-loud", "--extra=x"])
def test_one_of_our_options_is_never_taken_for_a_value(word):
    """`--extra --loud` lacks the text for --extra."""

    @dataclass(frozen=True)
    class Passing:
        extra: str = option("", "flags for another program")
        loud: bool = option(False, "in capitals")

    with pytest.raises(SystemExit) as stop:
        main("pass", {"": Command(Passing, lambda config: Result({}), "pass it on")}, ["--extra", word])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ada", "--lod"], "unknown option --lod; did you mean --loud?"),
        (["ada", "--time=2"], "unknown option --time; did you mean --times?"),
        (["ada", "--zzz", "2"], "unknown option --zzz ("),
        (["ada", "bob"], "no command 'bob'; known: again"),
        (["agian", "ada"], "no command 'ada'; known: again"),
        (["again", "ada", "bob"], "unexpected argument 'bob'"),
        (["ada", "--times"], "argument --times: expected one argument"),
    ],
)
def test_a_misspelt_word_is_one_line_with_the_nearest(words, message, capsys):
    """Thirty lines of usage would hide what was wrong; --help prints them."""
    with pytest.raises(SystemExit) as stop:
        main("greet", COMMANDS, words)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert "--help lists the options" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a recipe is needed; known: quiet, warm, or a .yaml file"),
        (["check"], "a recipe is needed; known: quiet, warm"),
        (["chek", "warm"], "no command or recipe 'chek', and not a .yaml file; did you mean 'check'?"),
        (["wram"], "no command or recipe 'wram', and not a .yaml file; did you mean 'warm'?"),
        (["check", "wram"], "no recipe 'wram', and not a .yaml file; did you mean 'warm'?"),
        (["warm", "quiet"], "unexpected argument 'quiet'"),
        (["warm", "--time", "2"], "unknown option --time; did you mean --times?"),
    ],
)
def test_a_command_with_recipes_does_nothing_without_one(words, message, tmp_path, capsys):
    """No argument, or one that is neither a recipe nor a command, starts nothing."""
    for recipe in ("warm", "quiet"):
        (tmp_path / f"{recipe}.yaml").write_text("name: ada\n")

    @dataclass(frozen=True)
    class Named:
        name: str = option("bob", "who to greet")
        times: int = option(1, "how often")

    def must_not_run(config: Named) -> Result:
        raise AssertionError(config)

    kind = Command(Named, must_not_run, "say hello", tmp_path)
    with pytest.raises(SystemExit) as stop:
        main("greet", {"": kind, "check": kind}, words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_commands_work_in_a_locale_without_utf_8():
    """Commands print UTF-8 in every locale."""
    code = (
        "import sys; from counsel.cli import exit_status\n"
        "sys.exit(exit_status(lambda: print('gr\\u00fc\\u00df dich \\u2013 \\u201cja\\u201d') or 0))"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8") == "gr\u00fc\u00df dich \u2013 \u201cja\u201d\n"


@dataclass(frozen=True)
class Baking:
    bread: str = argument("what to bake")
    oven: Literal["gas", "wood"] = option("gas", "how to bake", group="oven")
    shelf: Annotated[int, Literal[2, 4]] = option(4, "where to put it", group="oven")
    heat: PositiveFloat = option(2.0, "heat of the oven", group="oven", metavar="BARS")
    rest_s: NonNegativeFloat = option(0.0, "rest before baking")
    loaves: PositiveInt | None = option(None, "how many", shown="all that fit")
    salt: ShareBelowOne = option(0.02, "part of the flour")
    seeds: tuple[Seed, ...] = option((), "what to add on top")
    turns_s: tuple[PositiveFloat, ...] | None = option(None, "when to turn it")
    note: str = option("a long story " * 20, "what to write on it")

    def __post_init__(self) -> None:
        check_bounds(self)


def help_of(schema, capsys):
    with pytest.raises(SystemExit):
        main("bake", {"": Command(schema, lambda config: Result({}), "bake bread")}, ["--help"])
    return capsys.readouterr().out


def test_help_shows_groups_types_choices_bounds_and_defaults(monkeypatch, capsys):
    """Empty defaults are left out, long ones are shortened."""
    monkeypatch.setenv("COLUMNS", "200")
    lines = [" ".join(line.split()) for line in help_of(Baking, capsys).splitlines()]

    assert lines[0] == "usage: python -m bake BREAD [options]"
    for line in (
        "BREAD what to bake",
        "--oven {gas,wood} how to bake (default: gas)",
        "--shelf {2,4} where to put it (default: 4)",
        "--heat BARS heat of the oven (default: 2; above 0)",
        "--rest-s SECONDS rest before baking (default: 0; 0 or more)",
        "--loaves N how many (default: all that fit; at least 1)",
        "--salt X part of the flour (default: 0.02; at least 0 and below 1)",
        "--seeds N,... what to add on top (from 0 to 4294967295)",
    ):
        assert line in lines
    note = next(line for line in lines if line.startswith("--note TEXT"))
    assert len(note) < 120
    assert note.endswith("...)")
    titles = [line for line in lines if line.endswith(":") and " " not in line]
    assert titles == ["arguments:", "oven:", "options:", "general:"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"oven": "gaz"}, r"oven is 'gaz'; allowed: gas, wood \(did you mean 'gas'\?\)"),
        ({"oven": ["gas"]}, r"oven is \['gas'\]; allowed: gas, wood"),
        ({"shelf": "3"}, "shelf is 3; allowed: 2, 4"),
        ({"shelf": "top"}, "shelf is 'top'; allowed: 2, 4"),
        ({"heat": "0"}, "heat is 0.0; it must be above 0"),
        ({"rest_s": "-1"}, "rest_s is -1.0; it must be 0 or more"),
        ({"loaves": "0"}, r"loaves is 0; it must be at least 1 \(or none\)"),
        ({"salt": 1}, "salt is 1.0; it must be at least 0 and below 1"),
        ({"seeds": "1,-1"}, "seeds is -1; it must be from 0 to 4294967295"),
    ],
)
def test_a_value_out_of_bounds_names_what_is_allowed(given, message):
    """One line with the key, the value and what is allowed, whether YAML, a flag or code gives the value."""
    with pytest.raises(UserError, match=f"^{message}$"):
        load_config(Baking, None, {"bread": "rye", **given})


def test_a_config_made_in_code_keeps_the_same_bounds():
    """`check_bounds` in `__post_init__` checks values that come from neither a flag nor YAML."""
    assert Baking("rye", loaves=None, seeds=(1, 2), oven="wood").loaves is None
    for given in ({"heat": float("nan")}, {"heat": float("inf")}, {"loaves": 0}, {"seeds": (1, -1)}, {"oven": "gaz"}):
        with pytest.raises(UserError, match=f"^{next(iter(given))} is "):
            Baking("rye", **given)


@pytest.mark.parametrize("command", ["train", "serve", "eval", "loadtest"])
def test_no_help_shows_an_empty_default(command, capsys):
    """A default without a value is left out."""
    with pytest.raises(SystemExit):
        importlib.import_module(f"{command}.__main__").main(["--help"])
    text = capsys.readouterr().out
    assert "(default: )" not in text


ALL_COMMANDS = {
    (folder, name): command
    for folder in FOLDERS
    for name, command in importlib.import_module(f"{folder}.__main__").COMMANDS.items()
}


def counsel_script(*words, code="sys.exit(counsel.__main__.main())"):
    """The console script in its own process; `code` runs it."""
    script = f"import sys, counsel.__main__\nsys.argv = ['counsel', *{list(words)!r}]\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)


def test_counsel_help_lists_every_command_and_imports_nothing_heavy():
    """One line per command and sub-command, from the folders' own tables."""
    done = counsel_script(
        "--help",
        code="try: counsel.__main__.main()\n"
        f"except SystemExit: print([heavy for heavy in {(*HEAVY, 'openai', 'pydantic')} if heavy in sys.modules])",
    )
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "[]", done.stderr
    shown = {" ".join(line.split()) for line in lines if line.startswith("  ")}
    assert {f"{name or folder} {command.help}" for (folder, name), command in ALL_COMMANDS.items()} <= shown


def test_the_console_script_is_the_module_that_python_m_runs():
    """pyproject.toml's entry point exists, and `python -m counsel` says its own name."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert pkgutil.resolve_name(scripts["counsel"]) is counsel.__main__.main
    done = subprocess.run([sys.executable, "-m", "counsel", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("counsel 0.")
    done = subprocess.run([sys.executable, "-m", "counsel", "serve", "-h"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("usage: python -m counsel serve")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a command is needed; known: train, serve, eval, loadtest"),
        (["trian", "demo"], "no command 'trian'; did you mean 'train'?"),
        (["deploy"], "no command 'deploy'; known: eval, loadtest, serve, train"),
        (["--versoin"], "unknown option --versoin; did you mean '--version'?"),
        (["serve", "--prot", "1"], "unknown option --prot; did you mean --port? (counsel serve --help"),
    ],
)
def test_a_wrong_command_names_the_nearest(words, message):
    """One line, exit status 2."""
    done = counsel_script(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_hints_name_commands_as_the_user_typed_them(monkeypatch, capsys):
    """`counsel serve` in an error or a next step where the user typed `counsel`, `python -m serve` otherwise."""

    @dataclass(frozen=True)
    class Nothing:
        fail: bool = option(False, "see python -m eval")

    def run(config: Nothing) -> Result:
        if config.fail:
            raise UserError("start one with python -m serve chat, not python -m server or python -m serve.offline")
        return Result({}, next="python -m eval --run gentle")

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    commands = {"": Command(Nothing, run, "do nothing")}
    for launcher, named in (("counsel", "counsel"), ("python -m", "python -m")):
        assert main("greet", commands, [], launcher) == 0
        assert capsys.readouterr().err == f"next: {named} eval --run gentle\n"
        assert main("greet", commands, ["--fail"], launcher) == 1
        expected = f"start one with {named} serve chat, not python -m server or python -m serve.offline"
        assert capsys.readouterr().err == f"error: {expected}\n"
        with pytest.raises(SystemExit):
            main("greet", commands, ["--help"], launcher)
        assert f"see {named} eval" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=" ".join)
def test_every_command_refers_to_a_config_and_a_function(command):
    """Every `module:name` in a table can be imported."""
    config, run = (
        pkgutil.resolve_name(given) if isinstance(given, str) else given for given in ALL_COMMANDS[command][:2]
    )
    assert dataclasses.is_dataclass(config)
    assert callable(run)


@pytest.mark.parametrize("words", [["serve", "list", "--store", "."], ["serve", "safety", "check"]])
def test_output_that_nobody_reads_ends_the_command_without_a_traceback(words, tmp_path):
    """As in `counsel serve list | head -1`, when head has ended first."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "counsel", *words]
    with os.fdopen(write, "wb") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr, "BrokenPipe" in done.stderr) == (141, False, False), (
        done.stderr
    )
