"""The console script `counsel`: `counsel train ...`, `counsel serve ...`, `counsel eval ...`, `counsel loadtest ...`.

Each of these is a folder's `__main__`, imported by name and only when needed: `counsel` does not depend on them.
"""

import argparse
import importlib
import importlib.metadata
import sys
from types import ModuleType

from counsel.cli import FOLDERS, OneLineErrors
from counsel.values import nearest

DESCRIPTION = (
    "Fine-tune supportive-conversation LoRA adapters, serve them with their base, evaluate and load-test them."
)


def main(launcher: str = "counsel") -> int:
    """Run the command named on the command line; return the exit status."""
    words = sys.argv[1:]
    if words and words[0] in FOLDERS:
        return int(_folder(words[0]).main(words[1:], launcher))
    parser = OneLineErrors(
        prog=launcher,
        usage=f"{launcher} {{{','.join(FOLDERS)}}} ...",
        description=f"{DESCRIPTION}\n\ncommands ({launcher} COMMAND --help lists the options):\n{_overview()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        action="version",
        help="print the version",
        version=f"counsel {importlib.metadata.version('counsel-stack')}",
    )
    _, left_over = parser.parse_known_args(words)
    if not left_over:
        parser.error(f"a command is needed; known: {', '.join(FOLDERS)}")
    if left_over[0].startswith("-"):
        parser.error(f"unknown option {left_over[0]}; {nearest(left_over[0], ('--help', '--version'))}")
    return parser.error(f"no command {left_over[0]!r}; {nearest(left_over[0], FOLDERS)}")


def _folder(name: str) -> ModuleType:
    return importlib.import_module(f"{name}.__main__")


def _overview() -> str:
    """One line per command and sub-command, from the tables that the folders declare."""
    lines = []
    for folder in FOLDERS:
        for name, command in _folder(folder).COMMANDS.items():
            label = f"    {name}" if name else f"  {folder}"
            lines.append(f"{label:<22}{command.help}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main("python -m counsel"))
