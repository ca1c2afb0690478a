"""Several sources as one set of samples: what an epoch takes, in which order, and what is held out."""

import json

import builders
import numpy as np
import pytest

from liftdist.data import mixture, tokenised
from liftdist.data.chat import Encoder
from liftdist.data.order import BatchOrder, Share, epoch_order, epoch_sequences, split_micro_batches
from liftdist.data_settings import SourceConfig
from liftdist.errors import UserError

EPOCHS = 7
MIXES = {
    "one": [(40, 40)],
    "half of one": [(40, 20)],
    "an odd part": [(40, 11)],
    "each once": [(13, 13), (40, 40), (7, 7)],
    "one sample": [(1, 3), (50, 1)],
    "a third, and several passes": [(30, 10), (20, 53), (9, 9)],
    "of one size": [(20, 15), (20, 15)],
    "many": [(size, 1 + size * 3 // 4) for size in range(1, 300)],  # more than a byte can number
}
mixes = pytest.mark.parametrize("shares", [[Share(*pair) for pair in mix] for mix in MIXES.values()], ids=MIXES)


def permutation(seed, epoch, size):
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
@pytest.mark.parametrize("shares", [(), [Share(97, 97)]])
def test_the_order_of_one_source_is_what_it_was(seed, shares):
    """To the byte, so that earlier runs continue as they began."""
    lengths = np.random.default_rng(1).integers(3, 60, 97)
    for epoch in range(4):
        order, starts = epoch_sequences(lengths, seed, False, 64, epoch, shares)
        expected = permutation(seed, epoch, 97)
        assert (order.tobytes(), order.dtype) == (expected.tobytes(), expected.dtype)
        assert starts.tolist() == list(range(98))
        packed, starts = epoch_sequences(lengths, seed, True, 64, epoch, shares)
        assert packed.tobytes() == expected.tobytes()
        greedy, room = [], 0
        for place, length in enumerate(lengths[expected].tolist()):
            if length > room:
                greedy.append(place)
                room = 64
            room -= length
        assert starts.tolist() == [*greedy, 97]


@mixes
def test_a_source_is_walked_through_pass_after_pass(shares):
    firsts = np.cumsum([0, *(share.size for share in shares)])
    walks = [[] for _ in shares]
    for epoch in range(EPOCHS):
        order = epoch_order(shares, 5, epoch)
        assert order.dtype == np.int64
        assert (epoch_order(shares, 5, epoch) == order).all()
        for number, share in enumerate(shares):
            mine = order[(order >= firsts[number]) & (order < firsts[number + 1])] - firsts[number]
            assert len(mine) == share.taken
            walks[number] += mine.tolist()
    for share, walk in zip(shares, walks, strict=True):
        assert len(walk) == EPOCHS * share.taken
        for begin in range(0, len(walk), share.size):
            found = walk[begin : begin + share.size]
            assert len(set(found)) == len(found)  # none comes again before all others have come
    alike = [tuple(walk) for share, walk in zip(shares, walks, strict=True) if share == (20, 15)]
    assert len(set(alike)) == len(alike)  # sources of one size have orders of their own


def test_sources_are_mixed_evenly_and_by_the_seed():
    shares = [Share(1000, 500), Share(3000, 1500)]
    order = epoch_order(shares, 0, 0)
    in_first = [(order[begin : begin + 200] < 1000).sum() for begin in range(0, 2000, 200)]
    assert all(25 < count < 80 for count in in_first)  # 50 of each 200
    assert (order != epoch_order(shares, 1, 0)).any()
    assert ((order < 1000) != (epoch_order(shares, 0, 1) < 1000)).any()


@mixes
@pytest.mark.parametrize("packing", [False, True])
def test_batches_continue_anywhere_on_any_number_of_ranks(shares, packing):
    total = sum(share.size for share in shares)
    lengths = np.random.default_rng(0).integers(5, 60, total)
    made = BatchOrder(lengths, 1, packing, 128, 8, shares)
    steps, consumed, batches, begins = made.steps(3), 0, [], []
    for _ in range(steps):
        begins.append(consumed)
        batches.append(made.batch(consumed, 3))
        consumed += len(batches[-1])
    assert made.batch(consumed, 3) == []
    seen = [sample for batch in batches for sequence in batch for sample in sequence]
    assert seen == np.concatenate([epoch_order(shares, 1, epoch) for epoch in range(3)]).tolist()
    assert all(sum(lengths[s] for s in sequence) <= 128 for batch in batches for sequence in batch)
    for number in {0, len(batches) // 2, len(batches) - 1}:
        again = BatchOrder(lengths, 1, packing, 128, 8, shares)
        assert again.batch(begins[number], 3) == batches[number]
        for ranks in (1, 2, 3):
            dealt = [split_micro_batches(batches[number], lengths, rank, ranks, 2) for rank in range(ranks)]
            assert sorted(sequence for rank in dealt for micro in rank for sequence in micro) == sorted(batches[number])


# ---------------------------------------------------------------------------------------------------------------------
# How many samples of each.


def given(*settings):
    sources = [SourceConfig(path=f"{number}.jsonl", **one) for number, one in enumerate(settings)]
    return builders.config("m", "r", builders.Path("f"), data=dict(path=None, sources=sources)).data.training_sources


@pytest.mark.parametrize(
    ("settings", "sizes", "expected"),
    [
        ([{}], [40], [40]),
        ([{}, {}], [40, 7], [40, 7]),
        ([{"weight": 9}], [40], [40]),
        ([{"weight": 1}, {"weight": 1}], [30, 10], [20, 20]),
        ([{"weight": 1}, {"weight": 3}], [40, 15], [14, 41]),  # 13.75 and 41.25
        ([{"weight": 0.1}, {"weight": 0.2}, {"weight": 0.7}], [10, 10, 80], [10, 20, 70]),
        ([{"weight": 1}, {"weight": 1}, {"weight": 1}], [1, 1, 8], [4, 3, 3]),
        ([{"weight": 1e-300}, {"weight": 1e-300}], [3, 3], [3, 3]),
        ([{"samples": 100}, {"samples": 5}], [40, 40], [100, 5]),
        ([{"samples": 1}, {}], [40, 7], [1, 7]),
    ],
)
def test_an_epoch_takes(settings, sizes, expected):
    assert mixture.taken(given(*settings), sizes) == expected


def test_a_weight_too_small_for_one_sample_is_refused():
    with pytest.raises(UserError) as caught:
        mixture.taken(given({"weight": 1e-3}, {"weight": 1}), [40, 7])
    assert str(caught.value) == (
        "data.sources.0.weight: 0.001 of 1.001 is less than one of the 47 samples of an epoch; raise it, or leave 0 out"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Held-out records.


@pytest.fixture
def held_out(tokenizer, tmp_path):
    """The records, as texts, that are trained on and that are held out, of sources given as lists of records."""

    def of(sources, share, encoder=None, **settings):
        entries = []
        for number, lines in enumerate(sources):
            path = tmp_path / f"{number}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            entries.append(SourceConfig(path=str(path)))
        data = builders.config(tmp_path, "", tmp_path, data=dict(path=None, sources=entries) | settings).data
        made = [
            tokenised.tokenise(source, data, encoder or Encoder(tokenizer), 49152, tmp_path / "cache")
            for source in data.training_sources
        ]
        split = mixture.hold_out(data.training_sources, made, share)
        decoded = []
        for pair in split:
            for side in pair:
                assert (
                    len(side.table) == len(side.lengths) == len(side.learned) == len(side.records) == len(side.places)
                )
                assert [len(ids) for ids in side.table[:]["input_ids"]] == side.lengths.tolist()
            decoded.append(tuple([tokenizer.decode(ids) for ids in side.table[:]["input_ids"]] for side in pair))
        return decoded, split

    return of


def texts(count, word="number"):
    return [{"text": f"{word} {number}"} for number in range(count)]


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(40, 0.1, 4), (40, 0.5, 20), (40, 0.01, 1), (2, 0.5, 1), (2, 0.01, 1), (41, 0.25, 10)],
)
def test_a_share_of_each_source_is_held_out(held_out, count, share, expected):
    found, split = held_out([texts(count), texts(20, "other")], share)
    (trained, held), (_, other) = found
    assert (len(trained), len(held), len(other)) == (count - expected, expected, max(1, round(20 * share)))
    assert sorted(trained + held) == sorted(f"number {number}<|im_end|>" for number in range(count))
    assert split[0][1].where(0).partition(".jsonl:")[2].isdigit()


def test_what_is_held_out_depends_on_the_records_alone(held_out):
    """Neither on their order, nor on other sources, nor on how they are made tokens."""
    ((trained, held),), split = held_out([texts(40)], 0.2)
    ((_, shuffled),), _ = held_out([texts(40)[::-1]], 0.2)
    (_, (_, second)), _ = held_out([texts(9, "other"), texts(40)], 0.2)
    assert set(held) == set(shuffled) == set(second)
    ((_, cut),), _ = held_out([texts(40)], 0.2, max_length=3)
    assert len(cut) == len(held)
    assert not set(held) & set(trained)
    ((_, more),), again = held_out([texts(44)], 0.2)
    assert len(set(more) & set(held)) >= len(held) - 2  # more records move a few
    assert again[0][0].digest != split[0][0].digest


def test_equal_records_and_the_replies_of_one_are_on_one_side(held_out, tokenizer):
    chats = [
        {"messages": [{"role": role, "content": f"{chat} {turn}"} for turn in range(3) for role in ("user", "assistant")]}
        for chat in range(12)
    ]  # fmt: skip
    twice = [{"text": f"number {number % 10}"} for number in range(30)]
    found, split = held_out([chats, twice, texts(40)], 0.25, Encoder(tokenizer, turns="split"), max_length=512)
    for (trained, held), (kept, chosen) in zip(found, split, strict=True):
        assert trained
        assert held
        assert not set(kept.records) & set(chosen.records)
    assert len(found[0][1]) == 3 * 3  # three conversations, each three samples
    held = [text for _, texts in found[1:] for text in texts]
    assert not {text for trained, _ in found[1:] for text in trained} & set(held)


@pytest.mark.parametrize(
    ("sources", "named"),
    [
        ([texts(1)], "0.jsonl"),
        ([texts(3), texts(1, "x")], "1.jsonl"),
        ([texts(1) * 5], "0.jsonl"),
        ([texts(40), texts(2)], "1.jsonl"),
    ],
    ids=["one record", "one of two sources", "equal records", "all held out for the other"],
)  # fmt: skip
def test_a_share_that_leaves_nothing_is_refused(held_out, sources, named):
    if named == "1.jsonl" and len(sources[0]) == 40:  # both records of the second among the first's smaller half
        ((_, held),), _ = held_out([texts(40)], 0.5)
        sources = [texts(40), [{"text": text.removesuffix("<|im_end|>")} for text in held[:2]]]
    with pytest.raises(UserError) as caught:
        held_out(sources, 0.5)
    assert f"{named} (" in str(caught.value)
    assert "leaves nothing to train on; give held-out data of its own (data.eval_path) instead" in str(caught.value)


def test_tokens_are_kept_by_source(tokenizer, tmp_path, monkeypatch):
    """A further source, other weights, and a share that is held out leave those of the others as they are."""
    paths = [builders.write_records(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    paths[1].write_text(paths[1].read_text().replace("plus", "and"))

    def tokens(number=0, **settings):
        data = builders.config(tmp_path, "", tmp_path, data=dict(path=None) | settings).data
        return tokenised.tokenise(data.training_sources[number], data, Encoder(tokenizer), 49152, tmp_path / "cache")

    alone = tokens(path=str(paths[0]))
    a, b = (SourceConfig(path=str(path)) for path in paths)
    assert tokens(1, sources=[a, b]).digest != alone.digest
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("tokenised again"))
    weighted = SourceConfig(path=str(paths[0]), weight=2.0, name="first", format="prompt_completion")
    for settings in (
        dict(sources=[a, b]),
        dict(sources=[weighted, SourceConfig(path=str(paths[1]), weight=1.0)], format="auto"),
        dict(sources=[SourceConfig(path=str(paths[0]), samples=3)], eval_share=0.1, packing=True),
    ):
        if settings["sources"][0] is not weighted:
            assert tokens(**settings).digest == alone.digest
        assert tokens(len(settings["sources"]) - 1, **settings)
    with pytest.raises(pytest.fail.Exception):  # what decides tokens does
        tokens(sources=[weighted, b])
