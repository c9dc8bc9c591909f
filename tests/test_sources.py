"""Files are read as people export them: separators, quoting, encodings, compression and shapes are detected.

Tables are compared with Python's csv module, which is given the dialect, and with pandas.
"""

import csv
import gzip
import io
import json
import re
import zipfile

import pandas
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from counsel.errors import UserError
from train import delimited, documents
from train.data import DataConfig, prepare
from train.decoding import decode
from train.sources import load

HEADER = ["Context", "Response", "topic"]
ROWS = [[f"I feel stuck in week {n}", f"That sounds tiring, and it makes sense, week {n}", "work"] for n in range(40)]
TRICKY = st.text(alphabet="ab ,;\t|\"'\n\r\\&#1\u00e9\u4f60\U0001f622\u2028\x85", max_size=12)
DIALECTS = st.fixed_dictionaries(
    {
        "delimiter": st.sampled_from(",;\t|"),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
        "lineterminator": st.sampled_from(["\n", "\r\n", "\r"]),
    }
)


def written(rows: list[list[str]], header: list[str] = HEADER, **dialect: object) -> str:
    """A table as Python's csv module writes it."""
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows([header, *rows])
    return file.getvalue()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(TRICKY, min_size=3, max_size=3), max_size=6), DIALECTS)
def test_a_table_reads_as_the_csv_module_wrote_it(rows, dialect):
    """Any fields, with every separator, quoting and line end, none of which is given."""
    text = written(rows, **dialect)
    known = list(csv.reader(io.StringIO(text, newline=""), **dialect))
    assume(known == [HEADER, *rows])  # it writes some line ends that it does not read back

    table = delimited.read_table(text, "t.csv")

    assert [table.header, *table.rows] == known


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(TRICKY, min_size=3, max_size=3), max_size=4), st.sampled_from(",;\t|"), st.booleans())
def test_a_backslash_may_escape_quotes(rows, separator, is_quoted):
    """MySQL and Spark write this. What reads without escapes is read as the csv module does by default."""
    quoting = csv.QUOTE_ALL if is_quoted else csv.QUOTE_NONE
    rows = [[cell.replace("\r", "").replace("\n", "") for cell in row] for row in rows]
    rows.append(['she said "no", twice; then\tleft|it', 'a "b" c', "d"])
    text = written(rows, delimiter=separator, quoting=quoting, escapechar="\\", doublequote=False)

    table = delimited.read_table(text, "t.csv")

    assert [table.header, *table.rows] == [HEADER, *rows]
    assert "backslash" in table.format


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-8", "UTF-8"),
        ("utf-8-sig", "UTF-8 with a byte-order mark"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16 without a byte-order mark"),
        ("utf-16-be", "UTF-16 without a byte-order mark"),
        ("utf-32", "UTF-32"),
    ],
)
@pytest.mark.parametrize("dialect", [{}, {"delimiter": ";"}, {"delimiter": "\t", "quoting": csv.QUOTE_ALL}])
def test_every_encoding_reads_as_pandas_reads_it(tmp_path, encoding, message, dialect):
    """Umlauts, quotes, emoji and Chinese match what pandas reads when it is given the encoding."""
    rows = [
        ["Ich gr\u00fcble, nachts", "\u201cdo\u201d \u2013 it\nnow", ""],
        ["\u6211\u7761\u4e0d\u7740", "\U0001f622 ok", "x;y"],
    ]
    path = tmp_path / "t.csv"
    path.write_bytes(written(rows, **dialect).encode(encoding))

    source = load(str(path))

    known = pandas.read_csv(path, sep=dialect.get("delimiter", ","), encoding=encoding, keep_default_na=False)
    assert source.rows == known.to_dict("records")
    assert source.read_as.endswith(f", {message}")


@pytest.mark.parametrize("separator", [",", ";"])
def test_windows_1252_is_read_if_it_fits(tmp_path, separator):
    """German, French, Spanish and typographic quotes; some decoded words are shown for a person to judge."""
    rows = [
        [
            "Ich gr\u00fcble nachts \u2013 w\u00e4re das schlimm?",
            "\u201cDas klingt schwer\u201d, \u00c4nne\u2026",
            "Stra\u00dfe",
        ],
        ["J\u2019ai peur de l\u2019\u00e9t\u00e9", "d\u00e9j\u00e0 vu, \u0153uvre, na\u00efve", "10 \u20ac"],
        ["\u00bfQu\u00e9 te pas\u00f3 ma\u00f1ana?", "cora\u00e7\u00e3o, emo\u00e7\u00f5es", "\u00ab\u00e7a\u00bb"],
    ]
    path = tmp_path / "t.csv"
    path.write_bytes(written(rows, delimiter=separator).encode("cp1252"))

    source = load(str(path))

    assert [list(row.values()) for row in source.rows] == rows
    assert "Windows-1252 (with words such as gr\u00fcble, \u2013, w\u00e4re)" in source.read_as


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("\u042f \u043f\u043b\u043e\u0445\u043e \u0441\u043f\u043b\u044e, and I am tired", "cp1251"),
        ("\u042f \u043f\u043b\u043e\u0445\u043e \u0441\u043f\u043b\u044e, and I am tired", "koi8-r"),
        ("\u0394\u03b5\u03bd \u03ba\u03bf\u03b9\u03bc\u03ac\u03bc\u03b1\u03b9, and I am tired", "cp1253"),
        ("\u6211\u6700\u8fd1\u603b\u662f\u7761\u4e0d\u7740, and I am tired", "gb18030"),
        ("\u6700\u8fd1\u7720\u308c\u306a\u3044, and I am tired", "shift_jis"),
        ("\uc694\uc998 \uc7a0\uc774 \uc548 \uc640\uc694, and I am tired", "euc-kr"),
        ("B\u0119d\u0119 \u015bmia\u0142a, cho\u0107 \u017cycie mnie m\u0119czy i jest \u017ale", "cp1250"),
        ("P\u0159\u00edli\u0161 \u017elu\u0165ou\u010dk\u00fd k\u016f\u0148, p\u011bl", "cp1250"),
        ("\u0130yi de\u011filim, \u00e7ok \u00fcz\u00fcl\u00fcyorum ve \u015fa\u015fk\u0131n\u0131m", "cp1254"),
        ("caf\u00e9 na\u00efve, I don\u2019t know", "mac-roman"),
        ("caf\u00e9 na\u00efve, d\u00e9j\u00e0 vu, m\u00fcde", "cp850"),
    ],
)
def test_other_old_encodings_are_refused(text, encoding):
    """Windows-1252 would silently decode them to wrong letters."""
    with pytest.raises(UserError, match=r"'t.csv' is not UTF-8 \(byte \d+, line 2\).*save it as UTF-8"):
        decode(b"Context,Response\n" + text.encode(encoding), "t.csv")


def test_utf_8_with_one_invalid_byte_is_refused():
    """It is not Windows-1252, which would turn each correct character into two wrong ones."""
    content = "Context,Response\nna\u00efve,it\u2019s fine\n".encode() + b"caf\xe9,gr\xfc\xdfe f\xfcr dich"

    with pytest.raises(UserError, match=r"not UTF-8 \(byte 39, line 3\)"):
        decode(content, "t.csv")


def with_stray_opening(line: int, column: int) -> str:
    lines = written(ROWS, lineterminator="\n").split("\n")
    fields = next(csv.reader([lines[line - 1]]))
    quoted = [f'"{field}"' if "," in field else field for field in fields]
    quoted[column] = '"' + quoted[column].replace('"', "").replace(",", ";")
    lines[line - 1] = ",".join(quoted)
    return "\n".join(lines)


@pytest.mark.parametrize("line", [2, 27, 40, 41])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_stray_opening_quote_is_refused_by_line(line, column):
    """In any column, before quoted and unquoted fields, also in the last row."""
    with pytest.raises(UserError, match=rf"'t.csv' line {line} "):
        delimited.read_table(with_stray_opening(line, column), "t.csv")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(
            st.text(alphabet="ab ,;\n", min_size=1, max_size=9).map(lambda text: f"so {text} it"),
            min_size=2,
            max_size=2,
        ),
        min_size=2,
        max_size=6,
    ),
    DIALECTS,
    st.data(),
)
def test_a_lost_or_added_quote_never_loses_a_row(rows, dialect, data):
    """After one quote is added or removed, the file is refused, or no row and no word is lost."""
    text = written(rows, ["q", "a"], **dialect)
    body = text.index(dialect["lineterminator"]) + 1
    quotes = [at for at in range(body, len(text)) if text[at] == '"']
    starts = [
        at for at in range(body, len(text)) if text[at - 1] in dialect["delimiter"] + "\r\n" and text[at].isalpha()
    ]
    added, removed = [text[:at] + '"' + text[at:] for at in starts], [text[:at] + text[at + 1 :] for at in quotes]
    if not added + removed:
        return
    broken = data.draw(st.sampled_from(added + removed))
    try:
        table = delimited.read_table(broken, "t.csv")
    except UserError:
        return
    letters = [[cell.replace('"', "").strip() for cell in row] for row in table.rows]
    assert letters == [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Another stray quote closes it correctly: at the end of a question, an answer, a row.
        ('q,a\n"one two three,well then\nfour five six,so be it\nwhy me now",that is\na,b\n', "line 2 opens a quote"),
        ('q,a\nmy first one,"well\nfour five six,so it is\nwhy me now,that is hard"\na,b\n', "line 2 opens a quote"),
        ('q,a\nfine here,yes it is\n"one two three,well then\nfour five six,so it is"\n', "line 3 opens a quote"),
        ('q,a\nwhy,"not\nnow\n', "line 2 opens a quote, and nothing closes it"),
        ('q,a\n"bad day, and I,That sounds hard\n"Second","It is fine"\n', "line 2 opens a quote"),
        ('"q","a"\n"one","well\n"two","so"\n', "line 2 opens a quote"),
        ('"q","a"\none\ntwo","well"\n', 'line 3 closes a quote that was not opened'),
        ('"q","a"\n"one","well"\nI am 6\' 2","so it is"\n', "line 3 closes a quote that was not opened"),
        ('q,a\n"one\n\ntwo","well"\nI am\n\n6\' 2",fine\n', "line 7 closes a quote that was not opened"),
        ('q,a\n"no, never" he said,well\n', "line 2 has text after a closing quote (' he said,well')"),
        ("q,a\nwhy,well,so\n", "line 2 has more fields than the header; quote the fields that contain commas"),
        ("q;a\nok;yes\nwhy;well;so\n", "line 3 has more fields than the header; quote the fields that contain the sep"),
        ("sep=;\nq;a\nwhy;well;so\n", "line 3 has more fields"),
        ('\ufeffq\ta\r\nok\tyes\r\nwhy\t"well\r\n'.lstrip("\ufeff"), "line 3 opens a quote"),
    ],
)  # fmt: skip
def test_a_table_that_would_lose_rows_is_refused(text, message):
    """Each error names the line to look at."""
    with pytest.raises(UserError) as raised:
        delimited.read_table(text, "t.csv")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        # A quote that does not change where a field ends is part of the text.
        ('q,a\n"I am stuck" he said,well\n', [['"I am stuck" he said', "well"]]),
        ('q,a\nI am 6\' 2",well\n', [["I am 6' 2\"", "well"]]),
        ('q,a\nso "sad" today,well\n', [['so "sad" today', "well"]]),
        # Spaces around quotes, columns without a name, rows cut short, blank lines, a bar, one column.
        ('q, "a" ,b\n1, "x, y" ,"z"\n', [["1", "x, y", "z"]]),
        ("q,a,,\nwhy,well,,\n", [["why", "well"]]),
        ("q,a,topic\nwhy,well\n\nwho,me,x\n", [["why", "well"], ["who", "me", "x"]]),
        ("\n \nq|a\nwhy|well, so\n", [["why", "well, so"]]),
        ("q\nwhy\n", [["why"]]),
        ("'q','a'\n'it''s, me','well'\n", [["it's, me", "well"]]),
        # The separator is the one that fits the rows.
        ("q, as asked;a\nwhy, oh, why;well\nwho;me\n", [["why, oh, why", "well"], ["who", "me"]]),
        ('"sep=;"\nq;a\nwhy;well, so\n', [["why", "well, so"]]),
        ("sep=^\nq^a\nwhy^well, so\n", [["why", "well, so"]]),
        # Excel writes an emoji like this in Windows-1252.
        ("q;a\nI cry &#128546;;well\n", [["I cry &#128546;", "well"]]),
        ("q;a\nTom &amp;well\n", [["Tom &amp", "well"]]),
        # A field of several lines with a comma in each, among fully quoted rows, or next to another such field.
        ('"q","a"\n"one two three","I hear, you all\nrest now, please do\nand walk, every day"\n"so","be it"\n',
         [["one two three", "I hear, you all\nrest now, please do\nand walk, every day"], ["so", "be it"]]),
        ('q,a\nwhy not me,"I hear you all\nrest now, please do\nwalk now, every day"\nso,"be\n\nit"\n',
         [["why not me", "I hear you all\nrest now, please do\nwalk now, every day"], ["so", "be\n\nit"]]),
    ],
)  # fmt: skip
def test_a_table_written_by_hand_is_read(text, rows):
    """Irregular tables that lose nothing are read as they are."""
    assert delimited.read_table(text, "t.csv").rows == rows


PAIRS = [{"Context": "why?", "Response": "well\u2028then"}, {"Context": "who, me?", "Response": "caf\u00e9"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("".join(json.dumps(row) + "\r\n" for row in PAIRS), "JSON Lines"),
        ("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in PAIRS), "JSON Lines"),
        (json.dumps(PAIRS, indent=1), "JSON, a list of objects"),
        (json.dumps({"version": 1, "data": PAIRS}, indent=2), "JSON, a list of objects under 'data'"),
        (json.dumps({"data": PAIRS}), "JSON, a list of objects under 'data'"),
        (pandas.DataFrame(PAIRS).to_json(), "JSON, pandas' table by column"),
        (pandas.DataFrame(PAIRS).to_json(orient="index"), "JSON, pandas' table by index"),
        (pandas.DataFrame(PAIRS).to_json(orient="split"), "JSON, pandas' split table"),
        (pandas.DataFrame(PAIRS).to_json(orient="table"), "JSON, a list of objects under 'data'"),
        (pandas.DataFrame(PAIRS).to_json(orient="records", lines=True), "JSON Lines"),
        (json.dumps({name: [row[name] for row in PAIRS] for name in PAIRS[0]}), "JSON, a list by column"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_is_read_in_the_shapes_people_have(tmp_path, text, message, mark):
    """Every shape that pandas writes except bare values, and those of hubs and hand-written files."""
    for name in ("t.json", "t.jsonl", "t.txt"):
        (tmp_path / name).write_bytes((mark + text).encode())
        source = load(str(tmp_path / name))

        assert [{name: row[name] for name in PAIRS[0]} for row in source.rows] == PAIRS
        assert source.read_as.startswith(f"{message}, UTF-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": "b"}\n{"a": "c', "line 2 is not JSON: Unterminated string"),
        ('{"a": "b"}\n["c"]\n', "line 2 is a JSON list; it must be an object"),
        ('{"a": "b"}\n{"a": 1, "a": 2}\n', "line 2 is not JSON: the key 'a' is given twice"),
        ('[{"a": 1, "a": 2}]', "the key 'a' is given twice"),
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', "lists of objects under 'train', 'test'; keep one of them"),
        (
            '["a", "b"]',
            "contains a list that is not a list of objects; it must contain one object per line, a list of objects",
        ),
        ('{"meta": {"x": 1}, "n": [1, 2]}', "contains an object with 'meta', 'n'; it must contain"),
        ("[" * 100_000, "is not JSON"),
        ("Dear all,\nhello\n", "is not JSON: it starts with 'Dear all,'"),
    ],
)
def test_json_of_another_shape_is_a_one_line_error(text, message):
    """The error says what was found and what is allowed."""
    with pytest.raises(UserError) as raised:
        documents.read_documents(text, "t.json")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def zipped(**members: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(re.sub(r"_(?=\w+$)", ".", name.replace("__", "/")), text)
    return file.getvalue()


def test_compressed_files_are_decompressed(tmp_path):
    """gzip and zip, with any content and any name; macOS metadata in an archive is ignored."""
    text = written(ROWS)
    for name, content, message in (
        ("t.csv.gz", gzip.compress(text.encode("utf-16")), "UTF-16, in gzip"),
        ("t.csv", gzip.compress(text.encode()), "UTF-8, in gzip"),
        ("t.zip", zipped(talks__t_csv=text, MACOSX__t_csv="x", readme_md="y"), "'talks/t.csv' in a zip archive"),
        ("t.jsonl.gz", gzip.compress(json.dumps(dict(zip(HEADER, ROWS[0], strict=True))).encode()), "in gzip"),
    ):
        if name == "t.zip":
            content = content.replace(b"MACOSX/t.csv", b"MACOSX/._csv")
        (tmp_path / name).write_bytes(content)
        source = load(str(tmp_path / name))
        assert list(source.rows[0].values()) == ROWS[0]
        assert source.read_as.endswith(message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.zip", zipped(a_csv="q,a\n", b_csv="q,a\n"), "contains 'a.csv', 'b.csv'; it must contain one data file"),
        ("t.zip", zipped(a_md="x"), "contains 'a.md'; it must contain one data file"),
        ("t.zip", zipped(), "contains no rows|is not compressed"),
        ("t.csv", zipped(**{"[Content_Types]_xml": "x", "xl__t_csv": "y"}), "is an Excel spreadsheet; save its sheet"),
        ("t.xlsx", zipped(), "is a spreadsheet; save its sheet as CSV"),
        ("t.zip", zipped(a_csv="q,a\n")[:-30], "is damaged"),
        ("t.csv.gz", gzip.compress(written(ROWS).encode())[:-20], "is damaged"),
        ("t.csv.gz", b"q,a\n", "is not compressed as its suffix says"),
        ("t.gz", gzip.compress(b"q,a\n"), "must end in .csv"),
        ("t.csv", b"q,a\n\x00\x01\x02\x00\x00", "zero bytes|not valid UTF-16"),
    ],
)  # fmt: skip
def test_a_bad_archive_is_a_one_line_error(tmp_path, name, content, message):
    """The error says what is in it, or what to do."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        load(str(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (["context", "RESPONSE"], "'context' used as 'Context'; 'RESPONSE' used as 'Response'"),
        ([" Context", "Response "], "' Context' used as 'Context'; 'Response ' used as 'Response'"),
        (["Context", "Response", "context"], "UTF-8"),
    ],
)
def test_columns_are_found_whatever_their_case(tmp_path, header, message):
    """An exact name wins; another match is noted, also in the report."""
    path = tmp_path / "t.csv"
    path.write_text(written([row[: len(header)] for row in ROWS], header), encoding="utf-8")

    splits, report = prepare(DataConfig(data=str(path)))

    assert report.rows_out == 40
    assert {row["question"] for part in splits.values() for row in part} == {row[0] for row in ROWS}
    assert report.read_as.endswith(message)
    assert "read as      a table, comma between fields, UTF-8" in str(report)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (["Context", "Response", "Response"], "has 2 columns with the same name, 'Response' and 'Response'"),
        (["context", "CONTEXT", "Response"], "has 2 columns with the same name, 'context' and 'CONTEXT'"),
        (["q", "a", "t"], "has no column 'Context', only 'q', 'a', 't'; name the right one with --question-column"),
        (["My flatmate moved out and the flat feels so very empty now, you know", "Rest.", "x"], "has no header row"),
    ],
)
def test_a_header_that_is_not_clear_is_refused(tmp_path, header, message):
    """Two columns with the same name, no such column, or a first row that is a conversation."""
    path = tmp_path / "t.csv"
    path.write_text(written(ROWS, header), encoding="utf-8")
    with pytest.raises(UserError) as raised:
        prepare(DataConfig(data=str(path)))
    assert message in str(raised.value)
    assert len(str(raised.value)) < 300


def test_any_topic_is_accepted_and_an_answer_must_be_text(tmp_path):
    """A topic may be a number, a list or missing. Questions and answers must be text. Lone surrogates are removed."""
    path = tmp_path / "t.jsonl"
    rows = [dict(zip(HEADER, row, strict=True)) for row in ROWS]
    for row, topic in zip(rows, (3, ["grief", "work"], None, 2.5, {"a": 1}, float("nan"), True), strict=False):
        row["topic"] = topic
    rows[7]["Context"] = "I feel so \ud83d today \ude00\ud83d, what now?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    splits, _ = prepare(DataConfig(data=str(path)))

    found = {row["question"]: row["topic"] for part in splits.values() for row in part}
    assert [found[row[0]] for row in ROWS[:7]] == ["3", "grief, work", "", "2.5", "", "", "True"]
    assert "I feel so today , what now?" in found
    assert all(row["question"].encode() for part in splits.values() for row in part)
    for value in (5, ["b"], {"c": 1}, True):
        path.write_text(
            "".join(
                json.dumps({**row, "Response": value} if n == 40 else row) + "\n"
                for n, row in enumerate([*rows, rows[0]])
            )
        )
        with pytest.raises(UserError, match=rf"row 41: Response is {type(value).__name__}"):
            prepare(DataConfig(data=str(path)))
