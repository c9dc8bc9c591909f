"""Find the folder of an evaluation, runs/<name>/eval/<stamp>/, finished or not, and read its summary.

config.json       the resolved config and the server it ran against   (written first)
samples.jsonl     likelihood.jsonl                              (appended as replies arrive; see eval/samples.py)
turns.jsonl                                     (only with held-out conversations; see eval/conversations.py)
scores.jsonl      every answer with its scores                  (see eval/scoring.py)
judgements.jsonl  judge.json                                    (only with a judge; see eval/judge/ask.py)
report.md         report.html
summary.json      (written last: if it exists, the evaluation is finished; see eval/summary.py)
"""

import sys
import time
from pathlib import Path
from typing import Any

from counsel.errors import UserError
from counsel.files import read_json, write_json
from counsel.run import Run, open_run
from eval.summary import FORMAT, has_old_rows

# Settings that may change when an evaluation is continued: they change no row.
_INCIDENTAL = ("run", "url", "concurrency", "timeout_s")


def folder_for(run: Run, spec: dict[str, Any], kind: str = "eval") -> Path:
    """The folder of an unfinished evaluation with the same spec, or a new folder that holds the spec.

    kind: the folder of the run that it is in.

    An evaluation with failed rows counts as unfinished: its summary is removed, and those rows are asked again.
    """
    for folder in sorted((run.path / kind).glob("*"), reverse=True):
        if not (folder / "config.json").is_file() or _essence(read_json(folder / "config.json")) != _essence(spec):
            continue
        summary = folder / "summary.json"
        if not summary.exists() or any(arm["errors"] for arm in read_json(summary)["arms"].values()):
            summary.unlink(missing_ok=True)
            print(f"continuing {folder}", file=sys.stderr)
            return folder
    folder = run.path / kind / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    if folder.exists():
        raise UserError(f"{str(folder)!r} exists: another evaluation started in this second; try again")
    write_json(folder / "config.json", spec)
    return folder


def finished(where: str) -> Path:
    """The folder of a finished evaluation: `where` itself, or the latest one of the run `where`."""
    if (Path(where) / "summary.json").is_file():
        return Path(where)
    folders = sorted(path.parent for path in (open_run(where).path / "eval").glob("*/summary.json"))
    if not folders:
        raise UserError(f"run {where!r} has no finished evaluation; run python -m eval --run {where}")
    return folders[-1]


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished evaluation; raises UserError, with what to do, for one from an earlier version."""
    summary = read_json(folder / "summary.json")
    if summary.get("format") == FORMAT:
        return summary
    remedy = (
        f"its likelihoods are not comparable with today's; evaluate again with python -m eval --run {folder.parents[1]}"
        if has_old_rows(read_json(folder / "config.json"))
        else f"run python -m eval report {folder}"
    )
    raise UserError(f"{str(folder)!r} has format {summary.get('format')}, and this version reads {FORMAT}: {remedy}")


def _essence(spec: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in spec["config"].items() if key not in _INCIDENTAL}
    config["models"] = list(config["models"])
    return {key: value for key, value in spec.items() if key != "provenance"} | {"config": config}
