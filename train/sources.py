"""Raw rows of conversations, from a CSV, JSON, JSONL or Parquet file, a set on the hub, or the shipped sample."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from train.errors import UserError
from train.files import read_jsonl, sha256_of

SAMPLE = Path(__file__).parent / "sample" / "conversations.jsonl"

RawRow = dict[str, Any]


class Source(NamedTuple):
    """Rows as they are, the commit of a hub set ("" for a file), and the SHA-256 of the file or of the set's rows."""

    rows: list[RawRow]
    revision: str
    sha256: str


def load(data: str, revision: str = "") -> Source:
    """The rows of `data`: a file by its suffix, a hub id (org/name) at `revision`, or `sample`.

    Raises UserError when they cannot be had, or when there are none.
    """
    path = SAMPLE if data == "sample" else Path(data).expanduser()
    suffix = path.suffix.lower()
    if suffix not in _READERS and data.count("/") == 1 and not data.startswith((".", "~", "/")) and not path.exists():
        source = _from_hub(data, revision)
    elif suffix not in _READERS:
        raise UserError(f"data is {data!r}; it must end in {', '.join(_READERS)}, or be a hub id (org/name) or sample")
    elif not path.is_file():
        raise UserError(f"no data file {data!r}; check the path, or leave --data out to use the shipped sample")
    elif revision:
        raise UserError(f"revision is {revision!r}, but {data!r} is a file; only a hub set has revisions")
    else:
        source = Source(_read(path), "", sha256_of(path))
    if not source.rows:
        raise UserError(f"{data!r} holds no rows")
    return source


def _read(path: Path) -> list[RawRow]:
    try:
        return _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _read_csv(path: Path) -> list[RawRow]:
    csv.field_size_limit(1 << 27)  # the default, 128 KiB, is shorter than some pasted pages
    rows: list[RawRow] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{str(path)!r} line {reader.line_num} has more fields than the header; "
                        "quote the fields that hold commas"
                    )
                rows.append(row)
        except csv.Error as error:
            raise UserError(f"{str(path)!r} line {reader.line_num} is not CSV: {error}") from error
    return rows


def _read_json(path: Path) -> list[RawRow]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return read_jsonl(path)  # hub sets often name JSON Lines .json
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not JSON: {error}") from error
    if not all(isinstance(row, dict) for row in document):
        raise UserError(f"{str(path)!r} must hold a list of objects, or one object a line")
    return document


def _read_parquet(path: Path) -> list[RawRow]:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise UserError(f"{str(path)!r} is not Parquet: {' '.join(str(error).split())}") from error


_READERS = {".csv": _read_csv, ".json": _read_json, ".jsonl": read_jsonl, ".parquet": _read_parquet}


def _from_hub(name: str, revision: str) -> Source:
    import datasets
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision or None))
    except errors.RevisionNotFoundError as error:
        raise UserError(f"the hub set {name!r} has no revision {revision!r}; give a commit, tag or branch") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"no file and no hub set {name!r} (a private or gated one needs HF_TOKEN)") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot reach the hub for {name!r}; check the network, give a file, or leave --data out to use the sample"
        ) from error
    try:
        found = datasets.load_dataset(str(folder))
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"the hub set {name!r} cannot be read as one table: {str(error).splitlines()[0]}") from error
    if "train" not in found:
        raise UserError(f"the hub set {name!r} has no part named train; it has {', '.join(found)}")
    rows = found["train"].to_list()
    content = "".join(json.dumps(row, sort_keys=True, default=str) + "\n" for row in rows)
    # A snapshot's folder is named by its commit.
    return Source(rows, folder.name, hashlib.sha256(content.encode()).hexdigest())
