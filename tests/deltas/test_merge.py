"""Deltas merged: each rule against dense arithmetic on whole models, and what a merged delta is."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import builders
import pytest
import ranks
import torch
from commands import call, liftdist
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file

from liftdist.deltas import compress, merge, overlap
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Change, Delta, bits
from liftdist.errors import UserError
from liftdist.models.weights import ModelFolder
from liftdist.planning.live_bytes import LiveBytes
from liftdist.registry import MERGE_RULES

SHAPES = {"a.0.weight": (7, 11), "a.1.weight": (5, 3), "b": (13,)}


def models(dtype, count=3, seed=0):
    """A base model and ``count`` that differ from it at some weights, as flat tensors by name."""
    chance = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=chance).to(dtype) for name, shape in SHAPES.items()}
    others = []
    for number in range(count):
        other = {}
        for name, tensor in base.items():
            moved = torch.randn(tensor.shape, generator=chance) * (torch.rand(tensor.shape, generator=chance) < 0.5)
            other[name] = tensor if (name, number) == ("b", 1) else (tensor + moved).to(dtype)
        others.append(other)
    return base, others


def delta_of(base, other, digest="0" * 64, name="x"):
    def get(name):
        before, after = base[name].flatten(), other[name].flatten()
        at = (bits(before) != bits(after)).nonzero().squeeze(1)
        return Change(tuple(base[name].shape), base[name].dtype, at, after[at], before[at])

    return Delta(Path(name), digest, [name for name in base if not torch.equal(base[name], other[name])], get)


def applied(base, delta):
    """The whole model that a delta makes of a base model."""
    made = {name: tensor.clone() for name, tensor in base.items()}
    for name in delta.names:
        change = delta.get(name)
        flat = made[name].view(-1)
        assert torch.equal(bits(flat[change.indices]), bits(change.base.to(flat.dtype)))
        flat[change.indices] = change.values
    return made


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def trim(d, low, high):
    """A dense matrix of differences without the share ``low`` of the smallest of them and ``high`` of the largest."""
    sizes = d[d != 0].abs().sort().values
    n = len(sizes)
    top = min(round(high * n), n - 1)
    kept = sizes[min(round(low * n), n - 1 - top) : n - top] if n else sizes
    return d * torch.isin(d.abs(), kept)


def drawn(d, density, seed):
    """Which differences DARE keeps, drawn from the seed and those at which any delta has one."""
    changed = (d != 0).any(0)
    own = hashlib.sha256(f"{seed} ".encode() + d[:, changed].numpy().tobytes()).digest()
    chance = torch.Generator().manual_seed(int.from_bytes(own[:8], "little", signed=True))
    kept = torch.zeros(d.shape, dtype=torch.bool)
    kept[:, changed] = torch.rand(len(d), int(changed.sum()), generator=chance, dtype=torch.float64) < density
    return kept


def reference(rule, d, weights, alpha=None, density=None, beta=None, gamma=None, decay=None, seed=0):
    """The rules on dense differences ``[n, ...]``, as their papers have them."""
    w = weights.view(-1, *[1] * (d.dim() - 1))
    if rule == "sum":
        return (w * d).sum(0)
    if rule == "mean":
        return (w * d).sum(0) / w.sum()
    if rule == "interpolate":
        return alpha * d[0]
    if rule == "dare":
        return (w * drawn(d, density, seed) * d).sum(0) / density
    if rule == "breadcrumbs":
        return (w * torch.stack([trim(row, beta, gamma) for row in d])).sum(0)
    if rule == "ema":
        factors = [decay ** (len(d) - 1)] + [(1 - decay) * decay ** (len(d) - 1 - i) for i in range(1, len(d))]
        return sum(factor * row for factor, row in zip(factors, d, strict=True))
    trimmed = torch.stack([trim(row, 1 - density, 0) for row in d])
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    return torch.where(agree, w * trimmed, 0.0).sum(0) / agree.sum(0).clamp(min=1)


RULES = {
    "sum": {"weights": [1.0, -0.5, 2.0]},
    "mean": {"weights": [1.0, 3.0, 0.5]},
    "interpolate": {"alpha": 0.3},
    "ties": {"density": 0.4, "weights": [1.0, 2.0, 0.5]},
    "dare": {"density": 0.4, "seed": 3, "weights": [1.0, -0.5, 2.0]},
    "breadcrumbs": {"beta": 0.3, "gamma": 0.1, "weights": [0.5, 1.0, 2.0]},
    "ema": {"decay": 0.8},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_what_its_paper_says_on_dense_models(rule, dtype):
    base, others = models(dtype, 1 if rule == "interpolate" else 3)
    deltas = [delta_of(base, other) for other in others]
    made = applied(base, merge.merged(deltas, rule, RULES[rule], Path("out")))
    options = dict(RULES[rule])
    weights = torch.tensor(options.pop("weights", [1.0] * len(others)), dtype=torch.float64)
    for name, tensor in base.items():
        differences = torch.stack([other[name].double() - tensor.double() for other in others])
        expected = tensor.double() + reference(rule, differences, weights, **options)
        torch.testing.assert_close(made[name].double(), expected.to(dtype).double(), rtol=0, atol=1e-6)
        assert not torch.equal(made[name], tensor)


def test_every_rule_is_tested():
    assert set(RULES) == set(MERGE_RULES)


def test_dare_drops_at_random_and_keeps_the_mean():
    base = {"w": torch.zeros(300, 300)}
    delta = delta_of(base, {"w": torch.ones(300, 300)})
    made = [merge.merged([delta], "dare", {"density": 0.2, "seed": seed}, Path("out")).get("w") for seed in (1, 1, 2)]
    assert torch.equal(made[0].indices, made[1].indices)
    assert not torch.equal(made[0].indices, made[2].indices)
    assert bool((made[0].values == 5).all())  # rescaled
    assert abs(len(made[0].values) / 90000 - 0.2) < 0.01
    assert torch.equal(merge.merged([delta], "dare", {"density": 1.0}, Path("out")).get("w").values, torch.ones(90000))


def test_dare_draws_alike_for_a_tensor_that_is_stored_twice_and_apart_for_others():
    """A tied head that is stored beside the embedding stays equal to it."""
    random = torch.Generator().manual_seed(0)
    embedding, other = torch.randn(2, 40, 50, generator=random)
    base = {name: torch.zeros(40, 50) for name in ("embed", "head", "other")}
    deltas = [
        delta_of(base, {"embed": share * embedding, "head": share * embedding, "other": share * other})
        for share in (1.0, 0.5)
    ]
    found = merge.merged(deltas, "dare", {"density": 0.5}, Path("out"))
    assert torch.equal(found.get("embed").indices, found.get("head").indices)
    assert torch.equal(found.get("embed").values, found.get("head").values)
    assert not torch.equal(found.get("embed").indices, found.get("other").indices)


def test_ties_is_that_of_peft_where_nothing_cancels():
    differences = torch.randn(3, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    ours = MERGE_RULES.load("ties").merge(differences, weights=weights, density=0.3)
    torch.testing.assert_close(ours, merge_utils.ties([*differences], weights, 0.3))
    opposite = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert MERGE_RULES.load("ties").merge(opposite, weights=weights[:2], density=1.0) == 0
    assert merge_utils.ties([*opposite], torch.ones(2), 1.0) == 1  # the reason why it is not peft's


def test_trimming_leaves_something_of_every_tensor():
    ties = MERGE_RULES.load("ties").merge
    one = torch.tensor([[0.0, 3.0, -5.0]], dtype=torch.float64)
    weights = torch.ones(1, dtype=torch.float64)
    assert ties(one, weights=weights, density=0.2).tolist() == [0, 0, -5]
    assert ties(torch.zeros(1, 3, dtype=torch.float64), weights=weights, density=0.2).tolist() == [0, 0, 0]
    breadcrumbs = MERGE_RULES.load("breadcrumbs").merge
    assert breadcrumbs(one, weights=weights, beta=0.3, gamma=0.3).tolist() == [0, 3, 0]


def test_a_sum_is_exact_apart_and_associative():
    """Of disjoint deltas the sum holds the values of each, also of those that became tiny; of others it may be taken in steps."""
    base = {"w": torch.tensor([1.0, 2.0, 3.0, -4.0], dtype=torch.bfloat16)}
    one = delta_of(base, {"w": torch.tensor([1e-20, 2.0, 7.0, -4.0], dtype=torch.bfloat16)})
    two = delta_of(base, {"w": torch.tensor([1.0, -2e5, 3.0, -0.0], dtype=torch.bfloat16)})
    for pair in ((one, two), (two, one)):
        both = applied(base, merge.merged(pair, "sum", {}, Path("out")))
        assert torch.equal(bits(both["w"]), bits(torch.tensor([1e-20, -2e5, 7.0, -0.0], dtype=torch.bfloat16)))
    base, others = models(torch.float32)
    for name in base:  # multiples of 1/64: sums that float32 holds
        for model in (base, *others):
            model[name] = (model[name] * 64).round() / 64
    a, b, c = (delta_of(base, other) for other in others)

    def add(*parts):
        return merge.merged(parts, "sum", {}, Path("out"))

    whole = applied(base, add(a, b, c))
    for made in (add(add(a, b), c), add(a, add(b, c)), add(c, a, b)):
        assert all(torch.equal(whole[name], tensor) for name, tensor in applied(base, made).items())
    gone = merge.merged([a, a], "sum", {"weights": [1.0, -1.0]}, Path("out"))
    assert all(gone.get(name).indices.numel() == 0 for name in gone.names)


def test_a_delta_moves_onto_another_base(tmp_path):
    """And then is one of that base, in its dtype."""
    (old, (fine_tuned,)), (new, _) = models(torch.float32, 1), models(torch.bfloat16, 1, seed=9)
    save_file(new, tmp_path / "model.safetensors")
    onto = ModelFolder(tmp_path)
    moved = merge.merged([delta_of(old, fine_tuned)], "sum", {}, Path("out"), onto=(onto, "1" * 64))
    assert (moved.base_digest, moved.made["moved_from"]) == ("1" * 64, "0" * 64)
    made = applied({name: tensor.float() for name, tensor in new.items()}, moved)
    for name, tensor in old.items():
        torch.testing.assert_close(made[name], new[name].float() + (fine_tuned[name] - tensor), rtol=0, atol=1e-6)
        assert moved.get(name).stored == torch.bfloat16
    save_file({name: tensor.flatten() for name, tensor in new.items()}, tmp_path / "model.safetensors")
    flat = merge.merged([delta_of(old, fine_tuned)], "sum", {}, Path("out"), onto=(ModelFolder(tmp_path), "1" * 64))
    with pytest.raises(
        UserError, match=r"a.0.weight is \[77\], the delta is for \[7, 11\]; give a model of the same arch"
    ):
        flat.get("a.0.weight")


def test_a_head_that_is_stored_beside_the_embedding_it_is_tied_to_moves_with_it(tmp_path):
    """Whichever of both names the delta has: readers of files may take either."""
    base, fine_tuned = builders.llama(tmp_path / "base"), tmp_path / "tuned"
    tensors = load_file(base / "model.safetensors")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    shutil.copytree(base, fine_tuned)
    save_file(tensors | {embedding: tensors[embedding] + 0.25}, fine_tuned / "model.safetensors", {"format": "pt"})
    onto = shutil.copytree(base, tmp_path / "onto")
    new = {name: tensor * 2 for name, tensor in tensors.items()}
    save_file(new | {head: new[embedding].clone()}, onto / "model.safetensors", {"format": "pt"})
    at = ("--cache-dir", tmp_path / "cache")
    liftdist("diff", base, fine_tuned, "--output", tmp_path / "one", *at)
    liftdist("merge", tmp_path / "one", "--rule", "sum", "--onto", onto, "--output", tmp_path / "moved", *at)
    liftdist("apply", tmp_path / "moved", onto, "--output", tmp_path / "made", *at)
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert torch.equal(made[embedding], made[head])
    torch.testing.assert_close(made[embedding], new[embedding] + 0.25)
    words = ("merge", tmp_path / "moved", "--rule", "sum", "--onto", base, "--output", tmp_path / "back", *at)
    assert f"has no {head}" in (said := liftdist(*words, code=2))
    assert "whose files hold the same tensors, a tied head, too" in said
    assert not (tmp_path / "back").exists()
    said = liftdist("apply", tmp_path / "moved", base, "--output", tmp_path / "back", *at, code=2)
    assert f"has no {head}" in said
    assert "with all tensors of its base model: a tied head, too" in said


def test_what_a_rule_does_not_take_is_refused():
    base, others = models(torch.float32, 2)
    deltas = [delta_of(base, other) for other in others]
    elsewhere = dataclasses.replace(deltas[1], base_digest="1" * 64, location=Path("y"))
    for given, rule, options, problem in (
        (deltas, "summ", {}, "did you mean sum"),
        (deltas, "sum", {"density": 0.5}, "--density: --rule sum has no such option; it takes --weights"),
        (deltas, "ties", {"density": 0.5, "weights": [1.0, -1.0]}, "give positive weights, or take --rule sum"),
        (deltas, "ties", {}, "--rule ties: needs --density"),
        (deltas, "ties", {"density": 0.0}, "--density 0: must be from 0 to 1, and not 0"),
        (deltas, "sum", {"weights": [1.0, math.inf]}, "--weights: must be finite"),
        (deltas, "ema", {"decay": 1.5}, "--decay 1.5: must be from 0 to 1"),
        (deltas, "breadcrumbs", {"beta": 0.9, "gamma": 0.1}, "their sum must be below 1"),
        (deltas, "mean", {"weights": [1.0, -1.0]}, "a mean needs weights with a positive sum"),
        (deltas, "sum", {"weights": [1.0]}, "has 1 weights for 2 deltas"),
        (deltas, "interpolate", {"alpha": 0.5}, "takes one delta, not 2"),
        ([deltas[0], elsewhere], "sum", {}, "x and y are for different base models"),
    ):
        with pytest.raises(UserError) as refused:
            merge.merged(given, rule, options, Path("out"))
        assert problem in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_merged_delta_is_an_ordinary_one(folders, deltas, tmp_path):
    """By the command: the overlap is said before, the result applies, undoes to the bit, exports, and says how it was made."""
    one, two, cache = deltas
    at, out = ("--cache-dir", cache), tmp_path / "out.delta"
    said = liftdist("merge", one, two, "--rule", "mean", "--weights", "1,3", "--output", out, *at).splitlines()
    assert said[0].split() == ["weights", "norm", "common", "opposite", "norm", "there"]
    assert said[-1] == str(out)
    base, first, second = map(tensors_of, folders)
    folder = shutil.copytree(folders[0], tmp_path / "model")
    liftdist("apply", out, folder, *at)
    made = tensors_of(folder)
    common = 0
    for name, tensor in base.items():
        a, b = (other[name].float() - tensor.float() for other in (first, second))
        expected = (tensor.float() + a / 4 + 3 * b / 4).to(tensor.dtype)
        torch.testing.assert_close(made[name], expected, rtol=1e-6, atol=0)
        common += int(((a != 0) & (b != 0)).sum())
    changed = sum(delta_file.read(one).get(name).indices.numel() for name in delta_file.read(one).names)
    assert said[1].split()[1] == f"{changed:,}"
    assert said[1].split()[3] == f"{common / changed:.2%}"
    liftdist("apply", out, folder, "--undo", *at)
    assert builders.contents(folder) == builders.contents(folders[0])
    liftdist("export", out, "--base", folders[0], "--format", "hf", "--output", tmp_path / "hf", *at)
    about = json.loads((tmp_path / "hf" / "liftdist.json").read_text())["made"]
    assert about == {
        "merge": "mean", "weights": [1.0, 3.0],
        "deltas": [{"name": path.name, "sha256": delta_file.read(path).sha256} for path in (one, two)],
    }  # fmt: skip
    assert (
        "'1;3' is no list of numbers, such as 1,0.5" in call("merge", one, two, "--rule", "mean", "--weights", "1;3")[1]
    )
    again = liftdist("merge", one, "--rule", "sum", "--output", out, *at, code=2)
    assert "exists already" in again


def test_deltas_without_base_values_need_the_base(folders, deltas, tmp_path):
    one, two, cache = deltas
    at, slim = ("--cache-dir", cache), tmp_path / "slim"
    liftdist("diff", *folders[:2], "--output", slim, "--without-base", *at)
    said = liftdist("merge", slim, two, "--rule", "sum", "--output", tmp_path / "out", *at, code=2)
    assert said == f"liftdist: {slim}: holds no base values, to which differences are taken; give --base\n"
    said = liftdist(
        "merge", slim, two, "--rule", "sum", "--output", tmp_path / "out", "--base", folders[1], *at, code=2
    )
    assert "is not the base model of" in said
    assert not (tmp_path / "out").exists()
    liftdist("merge", slim, two, "--rule", "sum", "--output", tmp_path / "out", "--base", folders[0], *at)
    liftdist("merge", one, two, "--rule", "sum", "--output", tmp_path / "same", *at)
    slim, full = (delta_file.read(tmp_path / name) for name in ("out", "same"))
    for name in full.names:
        for key in ("indices", "values", "base"):
            assert torch.equal(getattr(slim.get(name), key), getattr(full.get(name), key))


def test_the_checkpoints_of_a_run_are_averaged_in_order(folders, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
    config = builders.config(
        folders[0], records, tmp_path, model=dict(dtype="bfloat16"), optimizer=dict(lr=0.05), train=dict(steps=4),
        selection=dict(refresh_interval=2),
    )  # fmt: skip
    ranks.run(1, builders.train_and_save, config, 3)
    run, at = tmp_path / "run", ("--cache-dir", tmp_path / "cache")
    for step in (2, 3, 4):
        liftdist("export", run, "--format", "delta", "--step", step, "--output", tmp_path / f"{step}.delta", *at)
    steps = [delta_file.read(tmp_path / f"{step}.delta") for step in (2, 3, 4)]
    assert steps[0].made == {"run": "run", "step": 2}
    said = liftdist("merge", run, "--rule", "ema", "--decay", 0.5, "--output", tmp_path / "ema.delta", *at)
    assert [line.split()[0] for line in said.splitlines()[1:4]] == [f"run/step-{step:08d}" for step in (2, 3, 4)]
    made = delta_file.read(tmp_path / "ema.delta")
    base = tensors_of(folders[0])
    models = [applied(base, delta) for delta in steps]
    assert len(made.names) == 14
    for name, tensor in applied(base, made).items():
        expected = sum(factor * model[name].double() for factor, model in zip((0.25, 0.25, 0.5), models, strict=True))
        assert torch.equal(tensor, expected.to(torch.bfloat16)), name
    damaged = next((run / "checkpoints" / "step-00000003").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said = liftdist("merge", run, "--rule", "ema", "--decay", 0.5, "--output", tmp_path / "x", *at, code=2)
    assert "step-00000003" in said
    assert "merge deltas of the others" in said
    assert "is not a run directory" in liftdist(
        "merge", folders[0], "--rule", "sum", "--output", tmp_path / "x", *at, code=2
    )


def write_merge_and_compress(folder, tensors):
    """Two deltas of matrices of 60 000 weights, half of them changed, their mean, on another base model, and compressed."""
    chance = torch.Generator().manual_seed(0)

    def changed(_):
        at = (torch.rand(60_000, generator=chance) < 0.5).nonzero().squeeze(1)
        return Change((60, 1000), torch.bfloat16, at, torch.ones(len(at)).bfloat16(), torch.zeros(len(at)).bfloat16())

    for name in ("one", "two"):
        delta = Delta(folder / name, "0" * 64, [f"w.{number}" for number in range(tensors)], changed)
        delta_file.write(delta, folder / name)
    given = merge.read([folder / "one", folder / "two"], None, folder)
    overlap.lines(given)
    delta_file.write(merge.merged(given, "mean", {}, folder / "out"), folder / "out")
    onto = ModelFolder(folder / "onto"), "1" * 64
    delta_file.write(merge.merged(given, "mean", {}, folder / "moved", onto=onto), folder / "moved")
    for method, options in (("exact", {}), ("t_switch", {"alpha": 0.5}), ("flex_switch", {"budget": 0.2})):
        compress.compress(delta_file.read(folder / "out"), method, options, folder / method, lambda _: None)
        delta_file.read(folder / method)


def test_memory_holds_one_tensor(tmp_path):
    """While deltas are written, read, compared, merged and compressed, however many tensors they have."""
    peaks = {}
    for tensors in (3, 15):
        folder = tmp_path / str(tensors)
        (folder / "onto").mkdir(parents=True)
        base = {f"w.{number}": torch.ones(60, 1000).bfloat16() for number in range(tensors)}
        save_file(base, folder / "onto" / "model.safetensors", {"format": "pt"})
        with LiveBytes() as live:
            write_merge_and_compress(folder, tensors)
        peaks[tensors] = live.peak
    assert peaks[15] < 1.1 * peaks[3]
