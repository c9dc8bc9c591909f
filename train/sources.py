"""Loads raw rows of conversations from a table, JSON or Parquet file (also compressed), the hub, or the sample."""

import gzip
import hashlib
import io
import json
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from counsel.errors import UserError
from train import delimited, documents
from train.decoding import decode

SAMPLE = Path(__file__).parent / "sample" / "conversations.jsonl"

_TABLES = (".csv", ".tsv", ".tab", ".txt")
_JSON = (".json", ".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zip")
_SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
SUFFIXES = (*_TABLES, *_JSON, ".parquet", *_COMPRESSED)

RawRow = dict[str, Any]


class Source(NamedTuple):
    """Raw rows, the commit of a hub data set ("" for a file), and the SHA-256 of the file or of the data set's rows.

    read_as: a description of the file's format. columns: names in the file's order, possibly repeated.
    """

    rows: list[RawRow]
    revision: str
    sha256: str
    read_as: str
    columns: list[str]


class _Content(NamedTuple):
    rows: list[RawRow]
    read_as: str
    columns: list[str]


def load(data: str, revision: str = "") -> Source:
    """The rows of `data`: a file with a known suffix, a hub id (org/name) at `revision`, or `sample`.

    Raises UserError if they cannot be read, or if there are none.
    """
    path = SAMPLE if data == "sample" else Path(data).expanduser()
    suffix = path.suffix.lower()
    if (
        suffix not in (*SUFFIXES, *_SPREADSHEETS)
        and data.count("/") == 1
        and not data.startswith((".", "~", "/"))
        and not path.exists()
    ):
        source = _from_hub(data, revision)
    elif suffix in _SPREADSHEETS:
        raise UserError(f"{data!r} is a spreadsheet; save its sheet as CSV UTF-8 and give that")
    elif suffix not in SUFFIXES:
        raise UserError(f"data is {data!r}; it must end in {', '.join(SUFFIXES)}, or be a hub id (org/name) or sample")
    elif not path.is_file():
        raise UserError(f"no data file {data!r}; check the path, or leave --data out to use the shipped sample")
    elif revision:
        raise UserError(f"revision is {revision!r}, but {data!r} is a file; only a hub data set has revisions")
    else:
        try:
            file = path.read_bytes()
            content, sha256 = _read(file, str(path)), hashlib.sha256(file).hexdigest()
            source = Source(content.rows, "", sha256, content.read_as, content.columns)
        except OSError as error:
            raise UserError(f"cannot read {data!r}: {error.strerror or error}") from error
    if not source.rows:
        raise UserError(f"{data!r} contains no rows")
    return source


def _read(content: bytes, name: str) -> _Content:
    """The rows of a file by its suffix. Compressed content is decompressed, whatever the name."""
    if content.startswith(b"\x1f\x8b"):
        unzipped = _read(_gunzip(content, name), name[: -len(".gz")] if name.lower().endswith(".gz") else name)
        return unzipped._replace(read_as=f"{unzipped.read_as}, in gzip")
    if content.startswith(b"PK\x03\x04"):
        member, extracted = _unzip(content, name)
        unzipped = _read(extracted, member)
        return unzipped._replace(read_as=f"{unzipped.read_as}, {member!r} in a zip archive")
    suffix = PurePath(name).suffix.lower()
    if suffix in _COMPRESSED:
        raise UserError(f"{name!r} is not compressed as its suffix says; rename it to its real suffix, such as .csv")
    if suffix == ".parquet":
        return _read_parquet(content, name)
    if suffix not in SUFFIXES:
        raise UserError(f"{name!r} must end in {', '.join(SUFFIXES)}")
    text, encoding = decode(content, name)
    if suffix in _JSON or (suffix == ".txt" and text.lstrip().startswith(("{", "["))):
        objects, shape = documents.read_documents(text, name)
        return _Content(objects, f"{shape}, {encoding}", list(dict.fromkeys(key for row in objects for key in row)))
    header, rows, described = delimited.read_table(text, name)
    cells = [dict(zip(header, [*row, *[None] * (len(header) - len(row))], strict=True)) for row in rows]
    return _Content(cells, f"a table, {described}, {encoding}", header)


def _gunzip(content: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name!r} is damaged: {error}; download or compress it again") from error


def _unzip(content: bytes, name: str) -> tuple[str, bytes]:
    """The name and content of the one data file in an archive."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        names = [
            entry.filename
            for entry in archive.infolist()
            if not entry.is_dir()
            and not entry.filename.startswith("__MACOSX/")
            and PurePath(entry.filename).name[0] != "."
        ]
        if "[Content_Types].xml" in names:
            raise UserError(f"{name!r} is an Excel spreadsheet; save its sheet as CSV UTF-8 and give that")
        members = [member for member in names if PurePath(member).suffix.lower() in SUFFIXES]
        if len(members) != 1:
            contents = ", ".join(map(repr, (members or names)[:5])) or "no files"
            raise UserError(f"{name!r} contains {contents}; it must contain one data file ({', '.join(SUFFIXES)})")
        return members[0], archive.read(members[0])
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{name!r} is damaged: {error}; download or compress it again") from error
    except (RuntimeError, NotImplementedError) as error:  # a password, a rare compression
        raise UserError(f"{name!r} cannot be extracted: {error}; extract it yourself and give the file") from error


def _read_parquet(content: bytes, name: str) -> _Content:
    from pyarrow import ArrowException, BufferReader, parquet

    try:
        table = parquet.read_table(BufferReader(content))
        repeated = [column for column, n in Counter(table.column_names).items() if n > 1]
        if repeated:
            raise UserError(f"{name!r} has two columns {repeated[0]!r}; rename or remove one")
        return _Content(table.to_pylist(), "Parquet", table.column_names)
    except ArrowException as error:
        raise UserError(f"{name!r} is not Parquet: {' '.join(str(error).split())}") from error


def _from_hub(name: str, revision: str) -> Source:
    import datasets
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision or None))
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"the hub data set {name!r} has no revision {revision!r}; give a commit, tag or branch"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"no file and no hub data set {name!r}; check the name, and set HF_TOKEN for a private or gated one"
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot reach the hub for {name!r}; check the network, give a file, or leave --data out to use the sample"
        ) from error
    try:
        loaded = datasets.load_dataset(str(folder))
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the hub data set {name!r} cannot be read as one table: {str(error).splitlines()[0]}"
        ) from error
    if "train" not in loaded:
        raise UserError(f"the hub data set {name!r} has no split named train; it has {', '.join(loaded)}")
    rows = loaded["train"].to_list()
    content = "".join(json.dumps(row, sort_keys=True, default=str) + "\n" for row in rows)
    # A snapshot's folder is named after its commit.
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return Source(rows, folder.name, sha256, "a hub data set", list(loaded["train"].column_names))
