"""The HTML pages of the demo, the evaluation and the load test: one look, one file each, no network.

    page("Load test", [section("Models", cells)], finding="The server met every objective.")

A page is `base.html` with `style.css` inside; `parts.html` holds the macros for tables and charts. Every value is
escaped unless it is Markup: questions, answers and names come from people and models.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counsel.chat import NOTICE

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_HERE = Path(__file__).parent
_NUMBER = re.compile(r"[-+(<]*\d.*|-?")

Cells = Sequence[Sequence[str]]


def page(
    title: str, sections: Sequence[str], *, finding: str = "", verdict: str = "", warnings: Sequence[str] = ()
) -> str:
    """A whole page: the title, the finding in one sentence, what limits it, then the sections in order."""
    return render("base.html", title=title, finding=finding, verdict=verdict, warnings=warnings, sections=sections)


def section(title: str, *contents: "Markup | Cells", note: str = "", folded: bool = False) -> "Markup":
    """A part of a page with a heading: charts (Markup), or cells of a table, the first row as its head.

    `folded`: closed until a reader opens it.
    """
    parts: Any = _environment().get_template("parts.html").module
    bodies = [
        parts.charts(content) if isinstance(content, str) else parts.table(title, content) for content in contents
    ]
    result: Markup = parts.section(title, bodies, note, folded)
    return result


def answer_columns(title: str, examples: Sequence[tuple[str, Sequence[tuple[str, str]]]], note: str = "") -> "Markup":
    """A section of questions, each with (name, answer) pairs side by side."""
    parts: Any = _environment().get_template("parts.html").module
    result: Markup = parts.section(title, [parts.answers(examples)], note)
    return result


def render(template: str, folder: Path = _HERE, **values: Any) -> str:
    """The text of a template in `folder`, which may extend `base.html` and import `parts.html`."""
    return _environment(folder).get_template(template).render(values)


def numeric(cells: Cells) -> list[bool]:
    """For each column, whether everything below its head is a number, a dash or empty."""
    return [all(_NUMBER.fullmatch(_plain(cell)) for cell in column) for column in zip(*cells[1:], strict=True)]


def _plain(cell: str) -> str:
    return cell.striptags() if hasattr(cell, "striptags") else cell


def _environment(folder: Path = _HERE) -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([folder, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # NaN is not JSON: a browser would refuse the whole document.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    environment.filters["numeric"] = numeric
    environment.globals["notice"] = NOTICE
    environment.globals["style"] = Markup((_HERE / "style.css").read_text(encoding="utf-8"))
    return environment
