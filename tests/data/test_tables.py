"""Parquet and Arrow files: read in parts, in bounded memory; what cannot be learned is refused by the name of its column."""

import json

import datasets
import pyarrow
import pytest
from commands import call, write_config
from pyarrow import parquet

from liftdist.data import records, sources, tables
from liftdist.data_settings import DataConfig
from liftdist.errors import UserError

ROWS = [
    {"prompt": f"{number} plus 1 is", "completion": str(number + 1) if number % 7 else None} for number in range(3000)
]
TABLE = pyarrow.Table.from_pylist(ROWS)


def write_arrow(path, table, new=pyarrow.ipc.new_stream, rows=700):
    with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_parquet(path, table, **how):
    parquet.write_table(table, path, **how)


def cast(type):
    return TABLE.cast(pyarrow.schema([(name, type) for name in TABLE.column_names]))


FORMS = {
    "one-group.parquet": lambda path: write_parquet(path, TABLE),
    "groups.parquet": lambda path: write_parquet(path, TABLE, row_group_size=999, compression="zstd"),
    "A.PARQUET": lambda path: write_parquet(path, TABLE, row_group_size=1),
    "large.parquet": lambda path: write_parquet(path, cast(pyarrow.large_string())),
    "view.parquet": lambda path: write_parquet(path, cast(pyarrow.string_view())),
    "dictionary.parquet": lambda path: write_parquet(path, cast(pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))),
    "pandas.parquet": lambda path: TABLE.to_pandas().to_parquet(path),
    "datasets.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "file.arrow": lambda path: write_arrow(path, TABLE, pyarrow.ipc.new_file),
    "stream.arrow": lambda path: write_arrow(path, TABLE),
    "large.arrow": lambda path: write_arrow(path, cast(pyarrow.large_string())),
}


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_hold_the_same_records(name, tmp_path):
    path = tmp_path / name
    FORMS[name](path)
    source = sources.open_source(str(path), None, "train")
    assert source
    assert source.is_table
    assert [record for _, record in source.read(0, 7)] == ROWS[:7]
    assert list(source.read(2997, 4000)) == [(f"{path}: record {n}", ROWS[n]) for n in range(2997, 3000)]
    assert len(source) == 3000
    parts = [list(source.read(begin, begin + 700)) for begin in (2100, 2800, 0, 700, 1400)]
    assert [record for part in (*parts[2:], *parts[:2]) for _, record in part] == ROWS


def test_what_a_table_adds_to_nested_objects_is_taken_out_again(tmp_path):
    """Columns have the keys of all records; those of other records are null."""
    turns = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [
            {"role": "user", "content": "a", "name": "x"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        ],
    ]
    tools = [{"function": {"name": "g", "arguments": {"y": 2}}}]
    lines = [
        {"messages": given, "tools": None if number == 0 else json.dumps(tools)} for number, given in enumerate(turns)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for large in (False, True):
        table = pyarrow.Table.from_pylist(lines)
        if large:
            schema = pyarrow.schema([(table.schema.field(0)), ("tools", pyarrow.large_string())])
            table = table.cast(schema)
        write_parquet(tmp_path / "a.parquet", table)
        assert "tool_calls" in table.schema.field("messages").type.value_type.names
        read = []
        for name in ("a.jsonl", "a.parquet"):
            path = str(tmp_path / name)
            source = sources.open_source(path, None, "train")
            reader = records.reader(source, DataConfig(path=path).training_sources[0])
            read.append([reader(record) for _, record in source.read(0, 9)])
        assert read[0] == read[1]


def parquet_of(tmp_path, **columns):
    write_parquet(tmp_path / "a.parquet", pyarrow.table(columns))
    return tmp_path / "a.parquet"


def damaged(tmp_path, cut):
    path = parquet_of(tmp_path, a=["text"] * 1000)
    path.write_bytes(cut(path.read_bytes()))
    return path


def damaged_arrow(tmp_path, cut, new=pyarrow.ipc.new_stream):
    write_arrow(tmp_path / "a.arrow", TABLE, new)
    (tmp_path / "a.arrow").write_bytes(cut((tmp_path / "a.arrow").read_bytes()))
    return tmp_path / "a.arrow"


def with_feature(tmp_path, feature, values, write="parquet"):
    made = datasets.Dataset.from_dict(
        {"text": ["a"], "photo": values},
        features=datasets.Features({"text": datasets.Value("string"), "photo": feature}),
    )
    path = tmp_path / f"a.{write}"
    if write == "parquet":
        made.to_parquet(path)
        return path
    made.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def encrypted(tmp_path):
    path = parquet_of(tmp_path, a=["text"] * 1000)
    data = path.read_bytes()
    path.write_bytes(b"PARE" + data[4:-4] + b"PARE")  # the magic of an encrypted footer
    return path


def checksum(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(
        path, pyarrow.table({"a": ["text"] * 9}), write_page_checksum=True, compression="none", use_dictionary=False
    )
    path.write_bytes(path.read_bytes().replace(b"\4\0\0\0text", b"\4\0\0\0next", 1))
    return path


def empty(tmp_path):
    return parquet_of(tmp_path, a=pyarrow.array([], pyarrow.string()))


def duplicate_columns(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    write_arrow(tmp_path / "a.arrow", table)
    return tmp_path / "a.arrow"


def not_text(tmp_path):
    column = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")
    )
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": column}))
    return tmp_path / "a.arrow"


def whole(contents):
    return lambda _: contents


IMAGE, AUDIO = datasets.Image(decode=False), datasets.Audio(decode=False)
PICTURE = {"bytes": b"", "path": None}
UNREAD = "cannot be read: "
PHOTO = "column 'photo' holds"
BAD = {
    "cut": (damaged, [lambda data: data[:-20]], UNREAD),
    "no footer": (damaged, [lambda data: data[:100]], UNREAD),
    "footer overwritten": (damaged, [lambda data: data[:-60] + b"\xff" * 50 + data[-10:]], UNREAD),
    "pages overwritten": (damaged, [lambda data: b"PAR1" + b"\xff" * 60 + data[64:]], UNREAD),
    "empty": (damaged, [whole(b"")], UNREAD),
    "json": (damaged, [whole(b'{"a": "b"}\n')], UNREAD),
    "encrypted": (encrypted, [], UNREAD),
    "checksum": (checksum, [], UNREAD),
    "no rows": (empty, [], "a.parquet: holds no record"),
    "arrow cut": (damaged_arrow, [lambda data: data[:-9000]], UNREAD),
    "arrow file cut": (damaged_arrow, [lambda data: data[:-9], pyarrow.ipc.new_file], UNREAD),
    "arrow empty": (damaged_arrow, [whole(b"")], UNREAD),
    "two columns": (duplicate_columns, [], "a.arrow: two columns are named 'text'"),
    "not UTF-8": (not_text, [], "a.arrow: cannot be read: 'utf-8' codec"),
    "images": (
        with_feature,
        [IMAGE, [PICTURE]],
        f"{PHOTO} images, and only text can be learned; remove it: dataset.remove_c",
    ),
    "nested images": (with_feature, [[IMAGE], [[PICTURE]]], f"{PHOTO} images"),
    "audio": (with_feature, [AUDIO, [None]], f"{PHOTO} audios"),
    "saved images": (with_feature, [IMAGE, [PICTURE], "saved"], f"{PHOTO} images"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_named(case, tmp_path):
    make, given, problem = BAD[case]
    path = make(tmp_path, *given)
    with pytest.raises(UserError) as caught:
        list(sources.open_source(str(path), None, "train").read(0, 5000))
    assert problem in str(caught.value)
    assert str(caught.value).startswith(f"data {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("completion", "kind"),
    [([1, 2], "int"), ([b"a", b"b"], "bytes"), ([1.5, None], "float"), ([None, "a"], "null")],
)
def test_values_that_are_no_text_are_named_by_their_record(completion, kind, tiny_model, tmp_path):
    path = parquet_of(tmp_path, prompt=["a", "b"], completion=completion)
    code, said = call("train", write_config(tmp_path, tiny_model, path))
    assert code == 2
    assert said == f"liftdist: {path}: record 0: 'completion' must be text, got {kind}\n"


def test_a_damaged_table_ends_the_command(tiny_model, tmp_path):
    path = damaged(tmp_path, lambda data: data[:-20])
    code, said = call("train", write_config(tmp_path, tiny_model, path))
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(f"liftdist: data {path}: cannot be read: ")


def test_rows_are_decoded_once(tmp_path, monkeypatch):
    """Reading part after part of one row group decoded it from its start each time."""
    path = parquet_of(tmp_path, text=[str(number) for number in range(10_000)])
    decoded = []
    original = tables.ParquetSource._batches

    def counted(self, begin):
        for first, batch in original(self, begin):
            decoded.append(len(batch))
            yield first, batch

    monkeypatch.setattr(tables.ParquetSource, "_batches", counted)
    source = sources.open_source(str(path), None, "train")
    decoded.clear()
    for begin in range(0, len(source), 500):
        assert [record["text"] for _, record in source.read(begin, begin + 500)] == [
            str(n) for n in range(begin, begin + 500)
        ]
    assert sum(decoded) <= 10_256
