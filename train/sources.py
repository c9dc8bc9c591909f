"""Loads raw rows of conversations from tables, JSON, Parquet (also compressed), saved data sets, the hub, or a sample.

Rows go through memory one at a time into a Spool, except those of a JSON document, of a text that is not UTF-8, and of
a compressed Parquet file, which are read as a whole.
"""

import gzip
import hashlib
import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple, cast

from counsel.errors import UserError
from train import delimited, documents
from train.decoding import CHUNK_BYTES, Text
from train.meter import Meter
from train.spool import Spool

SAMPLES = {
    "sample": Path(__file__).parent / "sample" / "conversations.jsonl",
    "dialogues": Path(__file__).parent / "sample" / "dialogues.jsonl",
}

_TABLES = (".csv", ".tsv", ".tab", ".txt")
_JSON = (".json", ".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zip")
_SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
SUFFIXES = (*_TABLES, *_JSON, ".parquet", *_COMPRESSED)

_PARQUET_BATCH_ROWS = 1000

RawRow = dict[str, Any]


class Source(NamedTuple):
    """Raw rows, the commit of a hub data set ("" for a file), and the SHA-256 of the file or of the data set's rows.

    read_as: a description of the file's format. columns: names in the file's order, possibly repeated. name: as given.
    """

    rows: Spool
    revision: str
    sha256: str
    read_as: str
    columns: list[str]
    name: str


class _Content(NamedTuple):
    """columns: None for those that the rows have."""

    rows: Iterator[RawRow]
    read_as: str
    columns: list[str] | None


class _MeteredFile(io.FileIO):
    """A file that shows on stderr how far it has been read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._meter = Meter(f"reading {path.name}", path.stat().st_size, "MB", scale=1e6)

    def readinto(self, buffer: Any) -> int:
        n_bytes = super().readinto(buffer)
        self._meter.at(self.tell())
        return n_bytes

    def close(self) -> None:
        if not self.closed:
            self._meter.done()
        super().close()


def load_each(data: str, revision: str = "") -> list[Source]:
    """The rows of each file that `data` names: one source as `load` takes, several with commas between, or a pattern.

    Raises UserError if one cannot be read or contains no rows, or if no file fits the pattern.
    """
    if data in SAMPLES or Path(data).expanduser().exists():
        return [load(data, revision)]
    if any(char in data for char in "*?["):
        pattern = Path(data).expanduser()
        names = sorted(map(str, Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))))
        if not names:
            raise UserError(f"no file fits the pattern {data!r}; check it, and quote it in a shell")
    else:
        names = [name.strip() for name in data.split(",")]
    if len(names) > 1 and revision:
        raise UserError(f"revision is {revision!r}, but data names {len(names)} files; only a hub data set has one")
    return [load(name, revision) for name in names]


def load(data: str, revision: str = "") -> Source:
    """The rows of `data`: a file with a known suffix, a folder that `datasets` saved, a hub id (org/name) at
    `revision`, or one of SAMPLES.

    Raises UserError if they cannot be read, or if there are none.
    """
    path = SAMPLES.get(data) or Path(data).expanduser()
    suffix = path.suffix.lower()
    if (
        suffix not in (*SUFFIXES, *_SPREADSHEETS)
        and data.count("/") == 1
        and not data.startswith((".", "~", "/"))
        and not path.exists()
    ):
        source = _from_hub(data, revision)
    elif path.is_dir():
        if revision:
            raise UserError(f"revision is {revision!r}, but {data!r} is a folder; only a hub data set has revisions")
        source = _from_folder(data, path)
    elif suffix in _SPREADSHEETS:
        raise UserError(f"{data!r} is a spreadsheet; save its sheet as CSV UTF-8 and give that")
    elif suffix not in SUFFIXES:
        raise UserError(f"data is {data!r}; it must end in {', '.join(SUFFIXES)}, or be a folder saved by `datasets`, "
                        f"a hub id (org/name), {' or '.join(SAMPLES)}")  # fmt: skip
    elif not path.is_file():
        raise UserError(f"no data file {data!r}; check the path, or leave --data out to use the shipped sample")
    elif revision:
        raise UserError(f"revision is {revision!r}, but {data!r} is a file; only a hub data set has revisions")
    else:
        try:
            with io.BufferedReader(_MeteredFile(path), CHUNK_BYTES) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                source = _stored(_read(file, str(path)), data, "", sha256)
        except OSError as error:
            raise UserError(f"cannot read {data!r}: {error.strerror or error}") from error
    if not source.rows:
        raise UserError(f"{data!r} contains no rows")
    return source


def _stored(content: _Content, name: str, revision: str, sha256: str) -> Source:
    rows = Spool()
    columns: dict[str, None] = {}
    for row in content.rows:
        rows.append(row)
        if content.columns is None:
            columns.update(dict.fromkeys(row))
    return Source(rows, revision, sha256, content.read_as, content.columns or list(columns), name)


def _read(file: BinaryIO, name: str) -> _Content:
    """The rows of a file by its suffix. Compressed content is decompressed, whatever the name."""
    file.seek(0)
    start = file.read(4)
    if start.startswith(b"\x1f\x8b"):
        unzipped = _read(_gunzip(file, name), name[: -len(".gz")] if name.lower().endswith(".gz") else name)
        return unzipped._replace(read_as=f"{unzipped.read_as}, in gzip")
    if start == b"PK\x03\x04":
        member, extracted = _unzip(file, name)
        unzipped = _read(extracted, member)
        return unzipped._replace(read_as=f"{unzipped.read_as}, {member!r} in a zip archive")
    suffix = PurePath(name).suffix.lower()
    if suffix in _COMPRESSED:
        raise UserError(f"{name!r} is not compressed as its suffix says; rename it to its real suffix, such as .csv")
    if suffix == ".parquet":
        return _read_parquet(file, name)
    if suffix not in SUFFIXES:
        raise UserError(f"{name!r} must end in {', '.join(SUFFIXES)}")
    text = Text(file, name)
    if suffix in _JSON or (suffix == ".txt" and next(text.chunks(), "").lstrip().startswith(("{", "["))):
        if documents.is_json_lines(text.chunks()):
            return _Content(documents.read_lines(text.chunks(), name), f"JSON Lines, {text.encoding}", None)
        objects, shape = documents.read_documents(text.whole(), name)
        return _Content(iter(objects), f"{shape}, {text.encoding}", None)
    header, rows, described = delimited.stream_table(text.chunks, name)
    cells = (dict(zip(header, [*row, *[None] * (len(header) - len(row))], strict=True)) for row in rows)
    return _Content(cells, f"a table, {described}, {text.encoding}", header)


def _gunzip(file: BinaryIO, name: str) -> BinaryIO:
    file.seek(0)
    unzipped = cast(BinaryIO, gzip.GzipFile(fileobj=file))
    try:
        _read_to_the_end(unzipped)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name!r} is damaged: {error}; download or compress it again") from error
    return unzipped


def _read_to_the_end(file: BinaryIO) -> None:
    """Damage shows when compressed content is read."""
    while file.read(CHUNK_BYTES):
        pass


def _unzip(file: BinaryIO, name: str) -> tuple[str, BinaryIO]:
    """The name and content of the one data file in an archive."""
    try:
        archive = zipfile.ZipFile(file)
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
        _read_to_the_end(cast(BinaryIO, archive.open(members[0])))
        return members[0], cast(BinaryIO, archive.open(members[0]))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{name!r} is damaged: {error}; download or compress it again") from error
    except (RuntimeError, NotImplementedError) as error:  # a password, a rare compression
        raise UserError(f"{name!r} cannot be extracted: {error}; extract it yourself and give the file") from error


def _read_parquet(file: BinaryIO, name: str) -> _Content:
    from pyarrow import ArrowException, parquet

    def rows() -> Iterator[RawRow]:
        try:
            for batch in table.iter_batches(_PARQUET_BATCH_ROWS):
                yield from batch.to_pylist()
        except ArrowException as error:
            raise UserError(f"{name!r} is damaged: {' '.join(str(error).split())}; download it again") from error

    file.seek(0)
    try:
        table = parquet.ParquetFile(file)
    except ArrowException as error:
        raise UserError(f"{name!r} is not Parquet: {' '.join(str(error).split())}") from error
    columns = table.schema_arrow.names
    repeated = [column for column, n in Counter(columns).items() if n > 1]
    if repeated:
        raise UserError(f"{name!r} has two columns {repeated[0]!r}; rename or remove one")
    return _Content(rows(), "Parquet", columns)


def _from_folder(name: str, path: Path) -> Source:
    """The rows of a data set that `datasets` saved to disk; the part named train if it has parts."""
    import datasets

    if not any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        raise UserError(f"{name!r} is a folder, but not one that `datasets` saved; name its files: {name}/*.jsonl")
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"the folder {name!r} cannot be read: {str(error).splitlines()[0]}; save it again") from error
    return _from_dataset(saved, name, "", f"a folder saved by `datasets` ({name!r})")


def _from_dataset(loaded: Any, name: str, revision: str, described: str) -> Source:
    """The rows of a `datasets` object, one at a time; of the part named train if it has parts."""
    read_as = "a hub data set" if revision else "a folder saved by `datasets`"
    if hasattr(loaded, "keys"):
        if "train" not in loaded:
            raise UserError(f"{described} has no split named train; it has {', '.join(loaded)}")
        loaded, parts = loaded["train"], loaded
        others = [part for part in parts if part != "train"]
        read_as += f" (train; not used: {', '.join(others)})" if others else ""
    digest = hashlib.sha256()
    return _stored(_Content(_hashed(loaded, digest), read_as, list(loaded.column_names)), name, revision, "")._replace(
        sha256=digest.hexdigest()
    )


def _hashed(rows: Iterable[RawRow], digest: Any) -> Iterator[RawRow]:
    for row in rows:
        digest.update((json.dumps(row, sort_keys=True, default=str) + "\n").encode())
        yield row


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
    # A snapshot's folder is named after its commit.
    return _from_dataset(loaded, name, folder.name, f"the hub data set {name!r}")
