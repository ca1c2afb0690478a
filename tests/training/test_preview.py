"""``liftdist data``: its figures are those worked by hand, its samples those that are trained, its errors those of a run."""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from html.parser import HTMLParser

import builders
import commands
import numpy as np
import pytest
from commands import write_config

from liftdist import cli
from liftdist import config as configs
from liftdist.console import Console
from liftdist.data import pieces
from liftdist.data.batches import collate
from liftdist.data.chat import Encoder
from liftdist.runs import claims
from liftdist.training import figures
from liftdist.training.inputs import prepare_inputs

TEMPLATE = (  # writes a reply's reasoning in the newest turn alone
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(*said, **more):
    """A conversation: a text of the user, a reply, and so on; ``more`` is in the first reply."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    turns[1] |= more
    return {"messages": turns}


CALL = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
RECORDS = [
    chat("Hi", "Yo", "A", "B", "C", "D"),  # 25 + 23 + 23 tokens, of which 4 + 3 + 3 are learned
    chat("Hi", "Yo", "A", "B", reasoning_content="r"),  # split: 41 with 20 learned, 48 with 3
    chat("Hi", "", tool_calls=CALL) | {"id": 7},  # 10 + 13 + 30, of which 32
    chat("Hi", "Yo", weight=0),  # left out
    chat("Hi", "x" * 100, name="n"),  # 123 cut to 80, of which 59
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose tokens are bytes, with an end and a beginning of turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = builders.llama(tmp_path_factory.mktemp("bytes"), vocab_size=300)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template=TEMPLATE).save_pretrained(
        folder
    )
    return folder


def config_of(folder, model, lines, **data):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"max_length": 80, "eval_path": None} | data
    return write_config(folder, model, path, data=data)


def run(*words):
    """Exit code, standard output and standard error of ``liftdist data``."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            cli.main(["data", *map(str, words)])
            code = 0
        except SystemExit as end:
            code = end.code
    return code, said.getvalue(), errors.getvalue()


def printed(*words):
    code, said, errors = run(*words)
    assert code == 0, errors
    return said


def as_json(*words):
    return [json.loads(line) for line in printed(*words, "--json").splitlines()]


def test_figures_are_those_worked_by_hand(model, tmp_path):
    said = printed(config_of(tmp_path, model, RECORDS), "--samples", 0)
    assert max(map(len, said.replace(str(tmp_path), "").replace(str(model), "").splitlines())) <= 80
    for row in (
        f"training data: {tmp_path}/data.jsonl",
        "  records          messages (detected: data.format=auto)",
        "  learned          every reply of a conversation (data.learn=all)",
        "  samples          5",
        f"  tokens           {71 + 41 + 48 + 53 + 80}",
        f"  of them learned  {10 + 20 + 3 + 32 + 59} ({100 * 124 / 293:.1f} %)",
        "  lengths          min 41, median 53, 90 % 80, 99 % 80, max 80",
        "  data.max_length  80",
        f"  40 - 44  1  {'█' * 30}",
        "  55 - 59  0",
        f"  80 - 84  1  {'█' * 30}",
        "  1 split into a sample for each reply (2)",
        "  1 left out: nothing to learn in them (4)",
        "  1 truncated to data.max_length (5)",
        "  fields that are not used: id",
        "  keys that the chat template does not read: name",
    ):
        assert row in said.splitlines(), said
    words = " ".join(said.split())
    assert "a whole conversation; of 1, in which the template drops a part of an earlier reply, one reply" in words
    assert f"chat template that of the tokenizer in {model}" in words
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([7], [f"7  1  {'█' * 30}"]),
        ([8] * 60 + [10] * 30, [f" 8  60  {'█' * 30}", " 9   0", f"10  30  {'█' * 15}"]),
        ([1] + [3] * 1000, ["1     1  █", "2     0", f"3  1000  {'█' * 30}"]),  # one of many still has a bar
        ([9, 10, 28], [f"{n:>2} - {n + 4:>2}  {k}" + "  " * bool(k) + "█" * 30 * k for n, k in (
            (5, 1), (10, 1), (15, 0), (20, 0), (25, 1))]),
        ([1, 2048], [f"{n:>4} - {n + 499:>4}  {k}" + "  " * bool(k) + "█" * 30 * k for n, k in (
            (0, 1), (500, 0), (1000, 0), (1500, 0), (2000, 1))]),
    ],
)  # fmt: skip
def test_lengths_have_bars(lengths, rows):
    assert figures.histogram(np.array(lengths)) == rows


@pytest.mark.parametrize(
    ("record", "settings", "row"),
    [
        (builders.RECORDS["prompt_completion"], [], "learned the response, and its end"),
        ({"text": "a"}, [], "learned the whole text, and its end"),
        (chat("a", "b"), ["data.learn=last"], "learned the last reply of a conversation (data.learn=last)"),
        (chat("a", "b"), ["data.turns=split"], "one reply, with what came before it (data.turns=split)"),
        (chat("a", "b"), ["data.format=messages"], "records messages (data.format)"),
        ({"q": "a", "a": "b"}, ["data.prompt_template={q}", "data.response_template={a}"], "in your own wording"),
        (chat("a", "b"), [f"data.chat_template={TEMPLATE}"], "chat template data.chat_template samples"),
        (chat("a", "b"), ["data.chat_template={DATED}"], "dated.jinja; it writes the date: {TODAY}, today; a run"),
    ],
)
def test_what_is_learned_is_said(record, settings, row, model, tmp_path):
    from datetime import datetime

    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ strftime_now('%d') }}" + TEMPLATE)
    settings = [setting.replace("{DATED}", str(dated)) for setting in settings]
    said = printed(config_of(tmp_path, model, [record]), *settings, "--samples", 0)
    assert row.replace("{TODAY}", f"{datetime.now():%Y-%m-%d}") in " ".join(said.split())


def test_the_date_is_that_of_a_run_that_exists(model, tmp_path, monkeypatch):
    config = config_of(tmp_path, model, [chat("a", "b")])
    monkeypatch.setattr("time.time", lambda: 1e9)
    claims.claim(tmp_path / "run", lambda _: {})
    monkeypatch.undo()
    said = printed(config, f"data.chat_template={{{{ strftime_now('%Y') }}}}{TEMPLATE}")
    assert "it writes the date: 2001-09-09, when the run began" in " ".join(said.split())
    assert "\n  2001<|im_start|>user" in said
    assert len([*(tmp_path / "run" / "attempts").iterdir()]) == 1


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        (chat("Hi", "Yo"), "<|im_start|>user↵\nHi<|im_end|>↵\n<|im_start|>assistant↵\n⟦Yo<|im_end|>↵⟧"),
        ({"prompt": "a", "completion": "😀é"}, "a⟦😀é<|im_end|>⟧"),
        ({"prompt": "⟦a⟧↵", "completion": "⟦"}, r"\u27e6a\u27e7\u21b5⟦\u27e6<|im_end|>⟧"),
        ({"prompt": "a\n", "completion": "\n\nb"}, "a↵\n⟦↵\n↵\nb<|im_end|>⟧"),
        ({"prompt": "\x1b[31m\r\x00", "completion": "\u202eb"}, r"\x1b[31m\r\x00⟦\u202eb<|im_end|>⟧"),
        ({"prompt": "שלום\t", "completion": "👩‍👩‍👧"}, "שלום\t⟦👩‍👩‍👧<|im_end|>⟧"),
    ],
)
def test_what_is_learned_is_in_brackets(record, shown, model, tmp_path):
    said = printed(config_of(tmp_path, model, [record]))
    assert "Samples; what is learned is in ⟦⟧:" in said
    text = said.partition(" learned\n")[2]
    assert text == "".join(f"  {line}\n" for line in shown.split("\n"))


def test_samples_are_spread_over_the_data(model, tmp_path):
    lines = [{"prompt": f"{n}", "completion": "x"} for n in range(10)]
    config = config_of(tmp_path, model, lines, eval_path=str(tmp_path / "data.jsonl"))

    def places(*words):
        return [
            place.removeprefix(f"{tmp_path}/data.jsonl:")
            for place in re.findall(r"(?m)^(\S.*): \d+ tok", printed(*words))
        ]

    held_out = [f"{n} (held out)" for n in (1, 5, 10)]
    assert places(config) == ["1", "5", "10", *held_out]
    assert places(config, "--samples", 1, "data.eval_path=") == ["1"]
    assert places(config, "--samples", 99, "data.eval_path=") == [str(n) for n in range(1, 11)]
    assert places(config, "--samples", 0) == []


@pytest.mark.parametrize(
    "lines",
    [
        RECORDS,
        [{"prompt": f"{n} ", "completion": "é😀" * n} for n in range(1, 30)],
        [{"text": "a"}, {"text": "bc\n"}, {"text": "😀" * 50}],
    ],
    ids=["messages", "prompt_completion", "text"],
)
def test_json_is_what_is_trained(lines, model, tmp_path, monkeypatch):
    file = config_of(tmp_path, model, lines)
    rows = as_json(file)
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("tokenised again"))  # the run finds the tokens
    config, _ = configs.load(str(file), [])
    samples = prepare_inputs(config, Console(False)).samples
    assert len(rows) == len(samples)
    for number, row in enumerate(rows):
        batch = collate(samples, [[number]])
        assert row["input_ids"] == batch["input_ids"][0].tolist()
        assert [*row["labels"][1:], -100] == batch["labels"][0].tolist()
        assert row["labels"][0] == -100
        assert row["place"] == samples.where(number)
        assert sum(label != -100 for label in row["labels"]) == samples.parts[0].learned[number]
    if "prompt" in lines[0]:
        assert [row["text"] for row in rows][:9] == [f"{n} {'é😀' * n}<|im_end|>" for n in range(1, 10)]
        assert [row["learned"] for row in rows][:9] == [["é😀" * n + "<|im_end|>"] for n in range(1, 10)]


def test_json_names_source_and_what_is_held_out(model, tmp_path):
    lines = [{"prompt": f"{n}", "completion": "x"} for n in range(10)]
    config = config_of(tmp_path, model, lines)
    rows = as_json(config, "data.eval_share=0.3")
    assert [row["held_out"] for row in rows] == [False] * 7 + [True] * 3
    assert sorted(row["text"] for row in rows) == [f"{n}x<|im_end|>" for n in range(10)]
    assert {row["source"] for row in rows} == {"data"}
    held_out = rows[-1]["place"]
    assert as_json(config, "data.eval_share=0.3", "--record", held_out)[0]["held_out"]
    assert [row["place"] for row in as_json(config, "--samples", 2)] == [f"{tmp_path}/data.jsonl:{n}" for n in (1, 10)]


def test_sources_of_a_mixture_are_told_apart(model, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": name}) + "\n")
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 1), ("b", 1))]
    config = config_of(tmp_path, model, RECORDS, path=None, sources=sources)
    said = printed(config)
    assert f"training data: {tmp_path}/a.jsonl\n" in said
    assert f"training data: {tmp_path}/b.jsonl\n" in said
    assert "  source b: 1 samples, an epoch takes 1 (1 pass)" in said.splitlines()
    assert [(row["source"], row["learned"]) for row in as_json(config)] == [
        ("a", ["a<|im_end|>"]),
        ("b", ["b<|im_end|>"]),
    ]
    assert "--record 1: is " in run(config, "--record", 1)[2]
    assert as_json(config, "--record", "b.jsonl:1")[0]["source"] == "b"


# ---------------------------------------------------------------------------------------------------------------------
# Records by place.


def kinds_of_data(folder, kind):
    """Data of ten records, whose prompts are their numbers, and as a path."""
    import datasets

    lines = [{"prompt": f"<{n}>", "completion": "x"} for n in range(10)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path = folder / kind
    if kind == "data.jsonl":
        path.write_text("\n" + text)  # a blank line has a number, too
    elif kind == "array.json":
        path.write_text(json.dumps(lines))
    elif kind == "table.csv":
        path.write_text('prompt,completion\n<0>,"x\n\ny"\n' + "".join(f"<{n}>,x\n" for n in range(1, 10)))
    elif kind == "table.parquet":
        datasets.Dataset.from_list(lines).to_parquet(path)
    elif kind == "parts":
        path.mkdir()
        for part in (0, 1):
            (path / f"train-{part}.jsonl").write_text("".join(text.splitlines(keepends=True)[5 * part : 5 * part + 5]))
    elif kind == "tables":
        path.mkdir()
        for part in (0, 1):
            datasets.Dataset.from_list(lines[5 * part : 5 * part + 5]).to_parquet(path / f"{part}.parquet")
    return path


@pytest.mark.parametrize(
    ("kind", "place", "number"),
    [
        ("data.jsonl", "5", 3),
        ("data.jsonl", "data.jsonl:5", 3),
        ("data.jsonl", "{path}:11", 9),
        ("array.json", "record 0", 0),
        ("array.json", "array.json: record 3", 3),
        ("table.csv", "5", 1),
        ("table.csv", "table.csv:6", 2),
        ("table.parquet", "record 4", 4),
        ("table.parquet", "4", 4),
        ("table.parquet", "{path}: record 9", 9),
        ("table.parquet", "table.parquet:record 0", 0),
        ("parts", "train-1.jsonl:2", 6),
        ("parts", "{path}/train-0.jsonl:5", 4),
        ("tables", "1.parquet: record 2", 7),
        ("tables", "{path}/0.parquet: record 4", 4),
    ],
)
def test_a_record_is_found_by_its_place(kind, place, number, model, tmp_path):
    path = kinds_of_data(tmp_path, kind)
    config = write_config(tmp_path, model, path, data=dict(eval_path=None))
    rows = as_json(config, "--record", place.format(path=path))
    assert [row["text"].partition("x")[0] for row in rows] == [f"<{number}>"]
    assert rows[0] in as_json(config, "--record", rows[0]["place"])


def test_records_say_what_became_of_them(model, tmp_path):
    config = config_of(tmp_path, model, RECORDS)
    said = printed(config, "--record", 4, "--record", 5, "--record", 2)
    titles = [line.removeprefix(f"{tmp_path}/") for line in said.splitlines() if line.startswith(str(tmp_path))]
    assert titles == [
        "data.jsonl:4: left out: nothing to learn in them",
        "data.jsonl:5: 80 tokens, 59 learned; truncated to data.max_length",
        "data.jsonl:2: 41 tokens, 20 learned; split into a sample for each reply",
        "data.jsonl:2: 48 tokens, 3 learned; split into a sample for each reply",
    ]
    (row,) = as_json(config, "--record", 4)
    assert (row["input_ids"], row["labels"], row["learned"], row["note"]) == (
        [], [], [], "left out: nothing to learn in them",
    )  # fmt: skip
    assert as_json(config, "--record", 2) == [
        row | {"note": "split into a sample for each reply"} for row in as_json(config)[1:3]
    ]
    (row,) = as_json(config, "--record", 5, "data.overlong=drop")
    assert row["note"] == "left out: longer than data.max_length"


# ---------------------------------------------------------------------------------------------------------------------
# The page.


class Page(HTMLParser):
    """The text of each sample, what of it is marked, and every tag."""

    def __init__(self, text):
        super().__init__()
        self.samples, self.marked, self.tags, self.titles, self._open = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "meta":
            return
        self._open.append(tag)
        if ("class", "text") in attributes:
            self.samples.append("")
            self.marked.append("")
            self.titles.append([])
        self.titles[-1:] and "title" in dict(attributes) and self.titles[-1].append(dict(attributes)["title"])

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "div" in self._open:
            self.samples[-1] += data
            self.marked[-1] += data if "mark" in self._open else ""


def test_the_page_shows_the_text_and_runs_nothing(model, tmp_path):
    lines = [
        {"prompt": "<script>alert(1)</script>&lt;\n\n", "completion": '"><img src=x onerror=alert(1)>'},
        {"prompt": "שלום 漢", "completion": "👩‍👩‍👧"},
        {"prompt": "</div></body><!-- ", "completion": "\x00\r]]>"},
    ]
    config = config_of(tmp_path, model, lines)
    assert printed(config, "--html", tmp_path / "page.html") == f"{tmp_path}/page.html\n"
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert not {"script", "img", "link", "iframe"} & {*page.tags}
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert page.samples[:2] == [line["prompt"] + line["completion"] + "<|im_end|>" for line in lines[:2]]
    assert page.samples[2] == r"</div></body><!-- \x00\r]]><|im_end|>"
    assert page.marked[:2] == [line["completion"] + "<|im_end|>" for line in lines[:2]]
    assert [len(titles) for titles in page.titles] == [
        len(lines[0]["prompt"] + lines[0]["completion"]) + 1, len("שלום 漢" + "👩‍👩‍👧") + 1, 18 + 5 + 1
    ]  # a token for each character, which are several bytes  # fmt: skip
    assert len(page.titles[1][0].split()) == 2
    assert "of them learned" in text
    assert oct((tmp_path / "page.html").stat().st_mode & 0o777) == oct(0o666 & ~_umask())
    before = (tmp_path / "page.html").stat().st_ino
    printed(config, "--html", tmp_path / "page.html", "--samples", 1)  # such a page is replaced, as a whole
    assert (tmp_path / "page.html").stat().st_ino != before
    assert len(Page((tmp_path / "page.html").read_text()).samples) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_json_alone_is_on_standard_output(model, tmp_path):
    config = config_of(tmp_path, model, RECORDS)
    code, said, errors = run(config, "--json", "--html", tmp_path / "page.html")
    assert code == 0
    assert [json.loads(line)["held_out"] for line in said.splitlines()] == [False] * 5
    assert f"data {tmp_path}/data.jsonl: 5 samples, 293 tokens, 124 of them learned" in errors
    assert len(Page((tmp_path / "page.html").read_text()).samples) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Terminals and pipes.


def test_a_reader_may_go(model, tmp_path):
    config = config_of(tmp_path, model, [chat("Hi", "Yo")] * 3000)
    words = [sys.executable, "-m", "liftdist", "data", str(config), "--json"]
    script = 'set -o pipefail; "$@" | head -1'
    head = subprocess.run(
        ["/bin/bash", "-c", script, "bash", *words],
        capture_output=True, text=True, check=False, cwd=commands.ROOT, timeout=100,
    )  # fmt: skip
    assert (head.returncode, len(head.stdout.splitlines())) == (0, 1)
    assert json.loads(head.stdout)["learned"] == ["Yo<|im_end|>\n"]
    assert "Traceback" not in head.stderr
    assert "not complete" not in head.stderr


@pytest.mark.parametrize(
    ("variables", "in_colour"),
    [
        ({}, True),
        ({"NO_COLOR": ""}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": "0"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals(variables, in_colour, model, tmp_path, monkeypatch):
    for name, value in ({"NO_COLOR": "", "TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    config = config_of(tmp_path, model, [{"prompt": "Hi", "completion": "Y\no"}])
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, contextlib.redirect_stdout(terminal):
        cli.main(["data", str(config), "--record", "1"])
    said = b""
    with contextlib.suppress(OSError):  # the end of what was written to a terminal that is closed
        while read := os.read(ours, 4096):
            said += read
    os.close(ours)
    green = "  Hi\x1b[32mY↵\x1b[0m\r\n  \x1b[32mo<|im_end|>\x1b[0m\r\n"
    assert said.decode().endswith(green if in_colour else "  Hi⟦Y↵\r\n  o<|im_end|>⟧\r\n")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes.

GOOD = json.dumps(chat("Hi", "Yo")) + "\n"


@pytest.mark.parametrize(
    ("text", "settings", "error"),
    [
        (GOOD, ["data.path=nowhere.jsonl"], "data nowhere.jsonl: no such file"),
        (GOOD * 2 + '{"messages": \n', [], r"data.jsonl:3: .*"),
        (GOOD * 1500 + '{"messages": []}\n', [], r"data.jsonl:1501: 'messages' must be a list of turns, got an empty list"),
        (GOOD, ["data.chat_template={{ raise_exception('no') }}"], r"data.jsonl:1: the chat template refuses .*: no.*"),
        (GOOD, ["data.chat_template=no.jinja"], "data.chat_template no.jinja: No such file or directory"),
        (json.dumps(chat("Hi", "Yo", weight=0)) + "\n", [], "data .*: nothing to learn: of 1 records 1 left out: .*"),
        (GOOD, ["data.max_length=4"], "data .*: nothing to learn: .*; raise data.max_length"),
        (GOOD, ["data.split=dev"], "data.split=dev: data .* has no splits, .*; leave data.split out"),
        (GOOD, ["data.fields.x=y"], "data.fields.x: is no field of formats.*"),
        (GOOD, ["model.path=/nowhere"], "model.path /nowhere: no such folder"),
        ('{"a": 1}\n', [], "data.jsonl:1: fields a fit no format .*"),
        ("", [], "data .*: holds no record"),
        (json.dumps(chat("Hi", "x" * 900)) + "\n", ["data.max_length=900"], "data.max_length=900: .*context is 512; lower .*"),
    ],
)  # fmt: skip
def test_what_a_run_refuses_is_refused_alike(text, settings, error, model, tmp_path):
    config = config_of(tmp_path, model, [])
    (tmp_path / "data.jsonl").write_text(text)
    code, said, errors = run(config, *settings)
    line = errors.splitlines()[-1]
    assert (code, said) == (2, "")
    assert re.fullmatch(f"liftdist: ({tmp_path}/)?{error}", line), line
    fetched = commands.call("select", config, *settings, "--prefetch")  # tokenises as ranks do
    assert (fetched[0], fetched[1].splitlines()[-1]) == (2, line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--samples", "-1"], "--samples -1: must be at least 0"),
        (["--record", "9"], "--record 9: no such record in {path}; .*"),
        (["--record", "other.jsonl:1"], "--record other.jsonl:1: no such record in {path}; .*"),
        (["--record", "0"], "--record 0: no such record .*"),
        (["--record", "first"], "--record first: no such record .*"),
        (["--record", "ata.jsonl:1"], "--record ata.jsonl:1: no such record .*"),
        (["--html", "{folder}/no/p.html"], "{folder}/no/p.html: folder {folder}/no does not exist; create it first"),
        (["--html", "{path}"], "{path}: exists already, and is no page of `liftdist data`; give another --html"),
        (["--html", "{folder}"], "{folder}: cannot be replaced: Is a directory; give another --html"),
        (["no.such=1"], ".*no.such.*"),
    ],
)
def test_mistakes_of_its_own(words, error, model, tmp_path):
    config = config_of(tmp_path, model, [chat("Hi", "Yo")])
    names = {"path": tmp_path / "data.jsonl", "folder": tmp_path}
    code, said, errors = run(config, *(word.format(**names) for word in words))
    assert (code, said) == (2, "")
    assert re.fullmatch(f"liftdist: {error.format(**names)}", errors.splitlines()[-1]), errors
    assert (tmp_path / "data.jsonl").read_text() == json.dumps(chat("Hi", "Yo")) + "\n"


def test_a_page_that_does_not_fit_on_the_disk_is_one_line(model, tmp_path, small_disk):
    config = config_of(tmp_path, model, [{"prompt": "a", "completion": "b" * 70}] * 400)
    code, _, errors = run(config, "--html", small_disk / "page.html", "--samples", 400)
    assert code == 2
    said = f"liftdist: {small_disk}/page.html: cannot be written: No space left on device; give another --html"
    assert errors.splitlines()[-1] == said
    assert [*small_disk.iterdir()] == []


# ---------------------------------------------------------------------------------------------------------------------
# Text of tokens.


def sentencepiece():
    """As Llama-2 has it: a blank before the text, bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij\n"]
    vocabulary = {letter: number for number, letter in enumerate([*letters, "▁a", "▁▁"])}
    made = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "▁")], byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return made


@pytest.mark.parametrize("text", ["a b", "abc a  b 😀 c", "a\n\n b", "é 👩‍👩‍👧 a", "a </s> b", "a \ufffd😀\ufffd a"])
def test_pieces_are_the_text_to_the_character(text):
    backend = sentencepiece()
    ids = backend.encode(text, add_special_tokens=False).ids

    def decode(some):
        return backend.decode(list(some), skip_special_tokens=False)

    assert decode(ids) == text
    for split in range(len(ids) + 1):
        learned = [number >= split for number in range(len(ids))]
        runs, tokens = pieces.runs(decode, ids, learned), pieces.tokens(decode, ids, learned)
        for cut in (runs, tokens):
            assert "".join(piece.text for piece in cut) == text
            assert [one for piece in cut for one in piece.ids] == ids
        assert [piece.learned for piece in runs] == [value for value in (False, True) if value in learned]
        assert all(piece.text for piece in tokens)
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(piece.text for piece in tokens)


def test_a_character_that_was_cut_through_is_shown_as_such(model, tmp_path):
    (row,) = as_json(config_of(tmp_path, model, [{"prompt": "a", "completion": "b😀"}], max_length=4))
    assert (row["text"], row["learned"]) == ("ab\ufffd", ["b\ufffd"])
