"""report.html: one file that needs nothing beside it, with tables, a plot, and a browser of every answer.

The page is `page.html`; it draws itself from the JSON put in place of `DATA`. Reading it needs a browser, no network.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.ask import Question
from eval.metrics import METRICS
from eval.report import judged_lead, judged_tables
from eval.samples import Row

_PAGE = Path(__file__).with_name("page.html")


def page(
    summary: Mapping[str, Any], questions: Sequence[Question], scores: Sequence[Row], judged: Mapping[str, Any] | None
) -> str:
    """The HTML text of a finished evaluation; `judged` is judge.json, None where no judge was asked."""
    data = {
        "summary": summary,
        "metrics": {name: metric._asdict() for name, metric in METRICS.items()},
        "questions": [question._asdict() for question in questions],
        "scores": scores,
        "judged": judged
        and {
            "lead": judged_lead(judged),
            "warnings": judged["warnings"],
            "tables": judged_tables(judged),
            "document": judged,
        },
    }
    # Inside <script> only these two sequences could end the element or open a comment, whatever a model wrote.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    before, after = _PAGE.read_text(encoding="utf-8").split(">DATA<")
    return f"{before}>{text}<{after}"
