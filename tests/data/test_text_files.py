"""JSON Lines, JSON, CSV and TSV as people have them; what is damaged or unclear is refused in one line that names its place."""

import bz2
import functools
import gzip
import json
import lzma
import os
import time
from pathlib import Path

import builders
import pyarrow
import pytest
from commands import call, write_config

from liftdist.data import json_text, local, sources, texts
from liftdist.errors import UserError

RECORDS = [{"prompt": f"é{number} plus 1 is\n", "completion": f'"{number + 1}"'} for number in range(3000)]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS)
compress_gzip = functools.partial(gzip.compress, mtime=0)  # bytes that name a test are the same in every process
COMPRESSED = {
    ".gz": compress_gzip,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
}


def csv_of(records, delimiter=",", end="\r\n"):
    cells = [['"' + value.replace('"', '""') + '"' for value in record.values()] for record in records]
    return end.join(delimiter.join(row) for row in [["prompt", "completion"], *cells]) + end


def open_at(path, split="train", subset=None):
    return sources.open_source(str(path), subset, split)


def read(path, begin=0, end=10**9, **how):
    return [record for _, record in open_at(path, **how).read(begin, end)]


def refusal(path, **how):
    with pytest.raises(UserError) as caught:
        read(path, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FORMS = {
    "a.jsonl": JSONL.encode(),
    "a.ndjson": JSONL.encode(),
    "a.JSONL": JSONL.encode(),
    "lines.json": JSONL.encode(),
    "array.json": json.dumps(RECORDS, indent=1).encode(),
    "array.jsonl": json.dumps(RECORDS, ensure_ascii=False).encode(),
    "one-line.json": json.dumps(RECORDS, separators=(",", ":")).encode(),
    "mark.jsonl": b"\xef\xbb\xbf" + JSONL.encode(),
    "mark.json": b"\xef\xbb\xbf" + json.dumps(RECORDS).encode(),
    "mark-within.jsonl": JSONL.encode().replace(b'{"prompt": "\\u00e97 ', b'\xef\xbb\xbf{"prompt": "\\u00e97 '),
    "crlf.jsonl": JSONL.replace("\n", "\r\n").encode(),
    "no-last-newline.jsonl": JSONL.rstrip().encode(),
    "blanks.jsonl": ("\n \r\n\n" + JSONL.replace("\n", "\n\n") + "\n\t\n").encode(),
    "a.csv": csv_of(RECORDS).encode(),
    "A.CSV": csv_of(RECORDS, end="\n").encode(),
    "mark.csv": b"\xef\xbb\xbf" + csv_of(RECORDS).encode(),
    "blanks.csv": ("\n\n" + csv_of(RECORDS).replace("\r\n", "\n\n") + "\n").encode(),
    "no-last-newline.csv": csv_of(RECORDS).rstrip().encode(),
    "a.tsv": csv_of(RECORDS, "\t").encode(),
    **{f"a.jsonl{suffix}": compress(JSONL.encode()) for suffix, compress in COMPRESSED.items()},
    "a.csv.GZ": compress_gzip(csv_of(RECORDS).encode()),
    "array.json.zst": COMPRESSED[".zst"](json.dumps(RECORDS, indent=1).encode()),
    "two-members.jsonl.gz": b"".join(compress_gzip(part.encode()) for part in (JSONL[:5001], JSONL[5001:])),
    "two-frames.jsonl.zst": b"".join(COMPRESSED[".zst"](part.encode()) for part in (JSONL[:5001], JSONL[5001:])),
}


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_hold_the_same_records(name, tmp_path):
    """Whole, forward in parts, and going back."""
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    source = open_at(path)
    assert source
    assert [record for _, record in source.read(0, 7)] == RECORDS[:7]
    assert [record for _, record in source.read(1500, 2100)] == RECORDS[1500:2100]
    assert len(source) == 3000
    parts = [list(source.read(begin, begin + 700)) for begin in (2100, 2800, 0, 700, 1400)]
    assert [record for part in (*parts[2:], *parts[:2]) for _, record in part] == RECORDS
    places = [where for part in (*parts[2:], *parts[:2]) for where, _ in part]
    assert places == [where for where, _ in open_at(path).read(0, 3000)]
    assert len(set(places)) == 3000
    assert all(place.startswith(f"{path}:") for place in places)


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("a.jsonl", '{"a": 1}\n\n\n{"a": 2}\n', [1, 4]),
        ("a.csv", 'a,b\nx,y\n\n"one\ntwo",z\n"quoted ""q"", and\n\n\nmore",\nlast,', [2, 4, 6, 10]),
        ("a.tsv", "a\tb\nx, y\tz\n\nq\tr\n", [2, 4]),
    ],
)
def test_lines_are_numbered_as_editors_do(name, text, places, tmp_path):
    (tmp_path / name).write_text(text)
    assert [where for where, _ in open_at(tmp_path / name).read(0, 9)] == [f"{tmp_path / name}:{n}" for n in places]


def test_cells(tmp_path):
    """All are text; an empty one is null. The column without a name is the index that pandas writes."""
    path = tmp_path / "a.csv"
    path.write_text(',instruction,"in,put",output\n0,007,,NaN\n1," a ","x\ny",null\n2,1e3,"",""""\n')
    assert read(path) == [
        {"Unnamed: 0": "0", "instruction": "007", "in,put": None, "output": "NaN"},
        {"Unnamed: 0": "1", "instruction": " a ", "in,put": "x\ny", "output": "null"},
        {"Unnamed: 0": "2", "instruction": "1e3", "in,put": None, "output": '"'},
    ]


def test_commas_and_tabs_make_different_data_of_the_same_bytes(tmp_path):
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_text("a\tb,c\n1\t2,3\n")
    first, second = open_at(tmp_path / "a.csv"), open_at(tmp_path / "a.tsv")
    assert first.digest(tmp_path) != second.digest(tmp_path)


def shown(value):
    return str(value[:30])


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (rb'{"prompt": "\ud800"}', r"\ud800 is half of a surrogate pair"),
        (rb'{"prompt": "a", "messages": [{"\uDFFF": 1}]}', r"\udfff is half of a surrogate pair"),
        (rb'{"prompt": "\ude00\ud83d"}', "is half of a surrogate pair"),
        (b'{"prompt": 1' + b"0" * 5000 + b"}", "holds a number of too many digits; write it as text"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deep"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "is nested too deep"),
        (b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}", "is nested too deep (more than 100 lists"),
        (b'{"prompt": NaN}', "NaN is no JSON; write null"),
        (b'{"prompt": [-Infinity]}', "-Infinity is no JSON; write null"),
        (b'{"prompt": 1e999}', "1e999 is beyond the largest number; write it as text"),
        (b'{"prompt": {"a": -' + b"9" * 400 + b".5}}", "-9999999999999999999 is beyond the largest number"),
        (b'{"prompt": "a", "prompt": "b"}', "key 'prompt' occurs twice"),
        (b'{"m": [{"role": "user", "role": "user"}]}', "key 'role' occurs twice"),
        ('{"prompt": "é"}'.encode("latin-1"), "not UTF-8 (byte 0xe9, column 13); convert the file: iconv"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8 (byte 0xed"),
        (b'{"prompt": "a\0"}', "holds NUL bytes (column 14): the file is damaged"),
        (b"\0" * 4096, "holds NUL bytes"),
        (b'{"prompt": "a", }', "not JSON: "),
        (b"{'prompt': 'a'}", "not JSON: Expecting property name"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not JSON: Extra data (column 17); one object per line"),
        (b'{"prompt": "tab\there"}', "not JSON: Invalid control character"),
        (b'{"prompt": "a', "not JSON: Unterminated string"),
        (b'{"prompt": ["a"', "not JSON: Expecting ',' delimiter"),
        (b"<<<<<<< HEAD", "not JSON: Expecting value (column 1)"),
        (b"version 1", "not JSON"),
        (
            b"{",
            "not JSON: Expecting property name enclosed in double quotes (column 2); one object per line, or one array",
        ),
        (b"7", "must be a JSON object, got int"),
        (b"null", "must be a JSON object, got null"),
        (b'"text"', "must be a JSON object, got str"),
        (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', "the line has more than"),
    ],
    ids=shown,
)
def test_a_bad_line_of_json_is_named(line, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_RECORD", 1 << 20 if b"aaaa" in line else json_text.MAX_RECORD)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    said = refusal(path)
    assert said.startswith(f"{path}:3: ")
    assert problem in said
    assert len(said) < 300 + len(str(path))


def test_pairs_of_surrogates_and_escaped_text_are_text(tmp_path):
    path = tmp_path / "a.jsonl"
    deep = '{"a": "' + "[{" * 999 + '", "b": ' + "[" * 98 + "]" * 98 + "}"
    path.write_text(r'{"a": "\ud83d\ude00", "b": "\\ud800", "c": "\u0000"}' + "\n" + deep)
    assert read(path) == [{"a": "\U0001f600", "b": r"\ud800", "c": "\0"}, json.loads(deep)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'[{"a": 1}\n, 7]', ": record 1: must be an object, got int"),
        (b'[{"a": 1}\n, [{"a": 1}]]', ": record 1: must be an object, got list"),
        (b'[{"a": 1},\n{"a": }]', ":2: not JSON: Expecting value"),
        (b'[{"a": 1}\n\n{"a": 2}]', ":3: not JSON: expecting , or ], got '{'"),
        (b'[{"a": 1},\n]', ":2: not JSON: an item of the array is missing"),
        (b'[{"a": 1},\n{"a": 2}', ":2: not JSON: the file ends within the array; is it complete?"),
        (b'[{"a": 1},\n{"a": "2', ":2: not JSON: Unterminated string"),
        (b'[{"a": 1}]\n[{"a": 2}]', ":2: not JSON: there is more after the end"),
        (b'[{"a": 1},\n{"a": 1, "a": 2}]', ":2: key 'a' occurs twice"),
        (b'[{"a": 1},\n{"a": NaN}]', ":2: NaN is no JSON"),
        (b'[{"a": 1},\n{"a": -1e400}]', ":2: -1e400 is beyond the largest number"),
        (rb'[{"a": "\ud800"}]', r":1: \ud800 is half of a surrogate pair"),
        (b'[{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]", ":1: is nested too deep"),
        (b'[{"a": 1' + b"0" * 5000 + b"}]", ":1: holds a number of too many digits"),
        (b'[{"a": "\xe9"}]', ":1: not UTF-8 (byte 0xe9"),
        (b'[\n{"a": "' + b"a" * (3 << 20) + b'"}]', ":2: an item of the array has more than"),
    ],
    ids=shown,
)
def test_a_bad_array_is_named(text, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(json_text, "MAX_RECORD", 1 << 20 if b"aaaa" in text else json_text.MAX_RECORD)
    path = tmp_path / "a.json"
    path.write_bytes(text)
    assert problem in (said := refusal(path))
    assert said.startswith(f"{path}:")


def test_items_of_an_array_are_put_together_across_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(json_text, "_CHUNK", 5)
    values = [{"é": ["\U0001f600\\", 1.5e-3, None, True, {"a": "]},{"}]}, {}, {"n": -12, "u": "\U0001f600"}]
    for ascii, indent in ((True, None), (False, 2)):
        (tmp_path / "a.json").write_text(json.dumps(values, ensure_ascii=ascii, indent=indent))
        assert read(tmp_path / "a.json") == json.loads(json.dumps(values))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"a,b\n1,2\n3\n", ":3: has 1 cells, and the first row names 2 columns"),
        (b"a,b\n1,2\n3,4,5\n", ":3: has 3 cells"),
        (b'a,b\n"x\ny",2\n3,4,\n', ":4: has 3 cells"),
        (b'a,b\n1,2\n"3,4\n5,6\n', ":3: a quote that begins in this row is not closed"),
        (b'a,b\n1,"2"3\n', ":2: ',' expected after '\"'; a quote inside a quoted cell is written twice"),
        (b"a,b,a\n1,2,3\n", ":1: two columns are named 'a'"),
        (b"a;b\n1;2\n", ":1: one column, named 'a;b': cells are separated by ',' in a file of this suffix, not by ';'"),
        (b"a\tb\n1\t2\n", "not by '\\t'"),
        (b"a,b\n1,\xe9\n", ":2: not UTF-8 (byte 0xe9, column 3)"),
        (b"a,b\n1,\0\n", ":2: holds NUL bytes"),
        (b"a,b\r1,2\r", ": lines end with a carriage return alone"),
        (b"a,b\n1,2\n" + b'"' + b"x\n" * (1 << 20), ":3: a cell has more than 1 MiB; is a quote not closed?"),
    ],
    ids=shown,
)
def test_a_bad_row_is_named(text, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_RECORD", 1 << 20)
    path = tmp_path / "a.csv"
    path.write_bytes(text)
    assert problem in (said := refusal(path))
    assert said.startswith(f"{path}:")


@pytest.mark.parametrize(
    ("name", "contents", "problem"),
    [
        ("a.jsonl", GOOD.encode("utf-16"), "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
        ("a.json", GOOD.encode("utf-16-le"), "is UTF-16"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-be").join([b"\xfe\xff", b""]), "is UTF-16"),
        ("a.jsonl", GOOD.encode("utf-32"), "is UTF-32"),
        ("a.jsonl", b"", "holds no record"),
        ("a.json", b" \n\t\n", "holds no record"),
        ("a.json", b"\xef\xbb\xbf\n", "holds no record"),
        ("a.json", b"[\n]\n", "holds no record"),
        ("a.csv", b"", "holds no record"),
        ("a.csv", b"a,b\n\n\n", "holds no record"),
        ("a.jsonl.gz", compress_gzip(b""), "holds no record"),
        ("a.jsonl.gz", compress_gzip(JSONL.encode())[:-3000], "cannot be read: Compressed file ended before"),
        ("a.jsonl.gz", compress_gzip(JSONL.encode())[:-8] + b"12345678", "cannot be read: CRC check failed"),
        ("a.jsonl.gz", GOOD.encode(), "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + b"\xff" * 99, "cannot be read: "),
        ("a.jsonl.bz2", bz2.compress(JSONL.encode())[:-20], "cannot be read: Compressed file ended before"),
        ("a.jsonl.xz", lzma.compress(JSONL.encode())[:-20], "cannot be read: Compressed file ended before"),
        ("a.jsonl.xz", b"\xfd7zXZ\0" + b"\xff" * 99, "cannot be read: "),
        ("a.jsonl.zst", COMPRESSED[".zst"](JSONL.encode())[:-20], "cannot be read: "),
        ("a.jsonl.zst", GOOD.encode(), "cannot be read: "),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
        ("a.txt", b"a", "must end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"),
        ("a.jsonl.zip", b"a", "must end in .jsonl"),
        ("a.parquet.gz", compress_gzip(b"a"), "must end in .jsonl"),
        ("jsonl", b"a", "must end in .jsonl"),
    ],
    ids=shown,
)
def test_a_bad_file_is_named(name, contents, problem, tmp_path):
    path = tmp_path / name
    path.write_bytes(contents)
    assert problem in (said := refusal(path))
    assert said.startswith(f"data {path}: ")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl: is no regular file" in refusal(tmp_path / "pipe.jsonl")
    assert "is no regular file" in refusal("/dev/null")
    assert "/dev/stdin: is no regular file" in refusal("/dev/stdin")
    assert "no such file" in refusal(tmp_path / "none.jsonl.gz")
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "none")
    assert "no such file" in refusal(tmp_path / "broken.jsonl")
    (tmp_path / "real").write_text(GOOD)
    (tmp_path / "link.jsonl").symlink_to("real")
    assert len(read(tmp_path / "link.jsonl")) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 3000)
    source = open_at(path)
    assert len(list(source.read(0, 10))) == 10
    with path.open("a") as file:
        file.write(GOOD)
    for change in (lambda: list(source.read(10, 20)), lambda: len(source), lambda: source.digest(tmp_path / "cache")):
        with pytest.raises(UserError, match="has changed while it was read; start again when it is complete"):
            change()
    source = open_at(path)
    assert len(source) == 3001
    later = time.time() + 10
    os.utime(path, (later, later))  # written anew, of the same size
    with pytest.raises(UserError, match="has changed while it was read"):
        list(source.read(0, 10))


def test_files_are_closed(tmp_path):
    """One stays open where reading paused; those that were read to their ends do not."""
    for number in range(20):
        (tmp_path / f"{number}.jsonl").write_text(GOOD * 3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    source = open_at(tmp_path)
    assert len(list(source.read(0, 50))) == 50
    assert len(source) == 60
    assert len(list(source.read(10, 50))) == 40
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


@pytest.mark.parametrize(
    ("name", "contents", "problem"),
    [
        (
            "a.jsonl",
            GOOD + r'{"prompt": "a", "completion": "\udc00"}',
            "a.jsonl:2: \\udc00 is half of a surrogate pair",
        ),
        ("a.csv", "prompt,completion\na,b\nc\n", "a.csv:3: has 1 cells, and the first row names 2 columns"),
        ("a.json", f"[{GOOD}, {GOOD[:-2]}, ]", "a.json:2: not JSON: "),
        ("a.csv.gz", "prompt,completion\n", "cannot be read: Not a gzipped file"),
        ("a.tsv", "prompt\tcompletion\na\t\n", "a.tsv:2: 'completion' must be text, got null"),
    ],
)
def test_the_command_names_file_and_line(name, contents, problem, tiny_model, tmp_path):
    (tmp_path / name).write_text(contents)
    config = write_config(tmp_path, tiny_model, tmp_path / name)
    code, said = call("train", config)
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith("liftdist: ")
    assert problem in said


def test_kinds_are_known_by_their_names():
    assert all(local.is_local(name) for name in ("a.csv", "b/a.JSON.gz", "a.tsv", "~/a", "./a", "data/*", "x?.jsonl"))
    assert not any(local.is_local(name) for name in ("owner/name", "name", "o/v1.5", "hf://datasets/o/n/a.jsonl"))


def test_a_damaged_line_beyond_the_first_records_ends_the_run(tokenizer, tmp_path):
    from liftdist.data import tokenised
    from liftdist.data.chat import Encoder

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(compress_gzip((GOOD * 2100 + '{"prompt": "a"\n').encode()))
    config = builders.config(tmp_path, path, tmp_path).data
    with pytest.raises(UserError, match=r"a.jsonl.gz:2101: not JSON"):
        tokenised.tokenise(
            config.training_sources[0], config, Encoder(tokenizer), 49152, tmp_path / "cache", shares=[(1, 2)]
        )
