"""Compressed deltas: what is kept is right to the bit both ways, and what is said of the rest is what it costs."""

import dataclasses
import itertools
import json
import shutil

import builders
import pytest
import torch
from commands import liftdist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from liftdist.deltas import difference
from liftdist.deltas import file as delta_file
from liftdist.deltas.compressions import flex_switch, t_switch
from liftdist.deltas.delta import Change, bits, edit
from liftdist.deltas.module import change_module
from liftdist.errors import UserError
from liftdist.models.weights import ModelFolder
from liftdist.serving import launch

METHODS = {"exact": (), "t_switch": ("--alpha", 0.5), "flex_switch": ("--budget", 0.25)}


def change_of(dtype, stored=None, seed=0, k=500):
    """A change of awkward weights: tiny ones, zeros of either sign, ones that grow or shrink a lot."""
    chance = torch.Generator().manual_seed(seed)
    base = torch.randn(k, generator=chance) * torch.logspace(-6, 2, k)
    base[:4] = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    values = base + torch.randn(k, generator=chance) * torch.logspace(1, -5, k)
    base = base.to(stored or dtype).to(dtype)
    indices = torch.randperm(2000, generator=chance)[:k].sort().values
    return Change((40, 50), stored or dtype, indices, values.to(dtype), base)


@pytest.fixture(scope="module")
def small(deltas, tmp_path_factory):
    """The first delta by every method, and what the command said."""
    folder, made = tmp_path_factory.mktemp("compressed"), {}
    for method, options in METHODS.items():
        said = liftdist(
            "compress", deltas[0], "--method", method, *options, "--output", folder / method, "--cache-dir", deltas[2]
        )
        made[method] = folder / method, said
    return made


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, None),
        (torch.float64, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
)
def test_a_difference_is_right_in_both_directions(dtype, stored, tmp_path):
    change = change_of(dtype, stored)
    for found in (difference.exact(change), *(t_switch.quantised(change, 0.3, width)[0] for width in (1, 2, 4, 8))):
        places = torch.searchsorted(change.indices, found.indices)
        base = change.base[places]
        made = found.applied(base.to(stored or dtype))
        assert torch.equal(bits(made.base), bits(base))
        assert torch.equal(bits(found.undone(made.values).base), bits(base))
        if found.corrections is None:
            assert torch.equal(bits(made.values), bits(change.values))
        else:
            assert 0 < len(places) < 0.75 * len(change.indices)
            assert bool((bits(made.values) != bits(base)).all())


def test_t_switch_is_that_of_its_paper():
    """Beside it, dense and slow, as the authors' code has it."""
    chance = torch.Generator().manual_seed(1)
    base, tau = torch.zeros(300), torch.randn(300, generator=chance)
    change = Change((20, 30), torch.float32, torch.arange(0, 600, 2), base + tau, base)
    found, scale = t_switch.quantised(change, 0.6, 1, norm=True)
    kept = torch.zeros(300)
    for sign in (1, -1):
        part = tau[sign * tau > 0].abs()
        threshold = part.topk(int(len(part) * (1 - 0.6))).values.min()
        chosen = (sign * tau >= threshold) & (sign * tau > 0)
        kept[chosen] = tau[chosen]
    expected = kept.sign() * kept.norm() / kept.sign().norm()
    made = torch.zeros(300)
    made[found.indices // 2] = found.steps
    torch.testing.assert_close(made, expected)
    assert scale == pytest.approx((kept.norm() / kept.sign().norm()).item())
    one = Change((1, 3), torch.float32, torch.tensor([0, 2]), torch.tensor([2.0, -3.0]), torch.zeros(2))
    assert t_switch.quantised(one, 0.9, 1)[0].indices.tolist() == [0, 2]  # something of either sign is left


def test_flex_switch_chooses_no_worse_than_any_other_choice_within_the_bytes():
    """On two matrices, against every pair of points of their hulls that leaves room for one more step; never above the budget."""
    hulls = {
        name: flex_switch.hull(flex_switch.points(name, change_of(torch.bfloat16, seed=seed, k=200 + 300 * seed)))
        for seed, name in enumerate("ab")
    }
    for found in hulls.values():
        slopes = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(found)]
        assert slopes == sorted(slopes, reverse=True)
        assert len(found) > 3
    of = {name: {choice: (size, error) for size, error, choice in found} for name, found in hulls.items()}
    widest = max(b[0] - a[0] for found in hulls.values() for a, b in itertools.pairwise(found))
    for budget in range(50, 2500, 50):
        chosen = flex_switch.choose(hulls, budget)
        size, error = (sum(of[name][choice][part] for name, choice in chosen.items()) for part in (0, 1))
        assert size <= budget
        for a, b in itertools.product(*hulls.values()):
            assert a[0] + b[0] > budget - widest or a[1] + b[1] >= error * (1 - 1e-9)


def test_flex_switch_keeps_equal_tensors_equal():
    """A tied head that is stored beside the embedding, whatever the budget."""
    chance, changes = torch.Generator().manual_seed(0), {}
    for name in ("embed", "other"):
        base = torch.randn(6000, generator=chance)
        values = base + torch.randn(6000, generator=chance)
        changes[name] = Change((60, 100), torch.float32, torch.arange(6000), values, base)
    changes["head"] = changes["embed"]
    for budget in (0.06, 0.12, 0.3):  # of which the first two end between equal matrices
        code = flex_switch.plan(changes.items, budget=budget)
        embed, head = (code(name, changes[name])[0] for name in ("embed", "head"))
        assert torch.equal(embed.indices, head.indices)
        assert torch.equal(embed.steps, head.steps)


def test_a_compressed_delta_is_small_and_says_what_it_is(deltas, small):
    before = deltas[0].stat().st_size
    whole = delta_file.read(deltas[0])
    for method, most in (("exact", 0.55), ("t_switch", 0.3), ("flex_switch", 0.3)):
        path, said = small[method]
        assert path.stat().st_size < most * before, method
        *rows, last, printed = said.splitlines()[1:]
        assert printed == str(path)
        assert last.startswith(f"{before:,} bytes before, {path.stat().st_size:,} after")
        assert len(rows) == len(whole.names)
        read = delta_file.read(path)
        assert read.made["original"] == whole.sha256
        assert read.made["lossy"] == (method != "exact")
        for row in rows:  # the error of each tensor is that of the file as it is read
            name, _, kept, _, error = row.split()
            if kept == "0":
                assert (name in read.known, error) == (False, "1.0000")
                continue
            change, found = whole.get(name), read.get(name)
            assert int(kept.replace(",", "")) == len(found.indices)
            tau = change.values.double() - change.base.double()
            assert float(error) == pytest.approx(
                difference.squared_error(change, found) ** 0.5 / float(tau.norm()), abs=6e-5
            )
            assert (float(error) == 0) == (method == "exact")
    assert 0.6 * 0.25 * before < small["flex_switch"][0].stat().st_size <= 0.25 * before
    told = liftdist("show", small["t_switch"][0])
    assert "compressed, not all of the original" in told
    assert whole.sha256 in told
    assert json.loads(liftdist("show", small["exact"][0], "--json"))["made"]["lossy"] is False


@pytest.mark.parametrize("method", METHODS)
def test_it_is_applied_undone_and_swapped_to_the_bit(method, folders, deltas, small, tmp_path):
    path, at = small[method][0], ("--cache-dir", deltas[2])
    folder = shutil.copytree(folders[0], tmp_path / "model")
    base = builders.contents(folder)
    liftdist("apply", path, folder, *at)
    whole, read = delta_file.read(deltas[0]), delta_file.read(path)
    made = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for name in read.names:
        change, found = whole.get(name), read.get(name)
        flat = ModelFolder(folders[0]).read(name).flatten()
        flat[found.indices] = found.applied(flat[found.indices]).values
        assert torch.equal(bits(made[name].flatten()), bits(flat))
        assert set(found.indices.tolist()) <= set(change.indices.tolist())
    if method == "exact":
        assert builders.contents(folder) == builders.contents(folders[1])
    liftdist("apply", deltas[1], folder, "--instead-of", path, *at)
    assert builders.contents(folder) == builders.contents(folders[2])
    assert "is not the base model of" in liftdist("apply", path, folder, "--undo", *at, code=2)
    assert builders.contents(folder) == builders.contents(folders[2])
    liftdist("apply", path, folder, "--instead-of", deltas[1], *at)
    liftdist("apply", path, folder, "--undo", *at)
    assert builders.contents(folder) == base


@pytest.mark.parametrize("method", METHODS)
def test_it_is_taken_wherever_a_delta_is(method, folders, deltas, small, tmp_path):
    path, at = small[method][0], ("--cache-dir", deltas[2])
    tuned = shutil.copytree(folders[0], tmp_path / "tuned")
    liftdist("apply", path, tuned, *at)
    liftdist("diff", folders[0], tuned, "--output", tmp_path / "plain", *at)
    plain = delta_file.read(tmp_path / "plain")
    for words in (
        ("export", path, "--base", folders[0], "--format", "delta", "--output", tmp_path / "exported", *at),
        ("merge", path, "--rule", "sum", "--base", folders[0], "--output", tmp_path / "merged", *at),
        ("compress", path, "--base", folders[0], "--output", tmp_path / "again", *at),
    ):
        liftdist(*words)
        made = difference.on(delta_file.read(words[words.index("--output") + 1]), ModelFolder(folders[0]))
        for name in plain.names:
            one, other = made.get(name), plain.get(name)
            assert torch.equal(one.indices, other.indices)
            assert torch.equal(bits(one.values), bits(other.values))
            assert torch.equal(bits(one.base), bits(other.base))
    assert "with base values" in liftdist("show", tmp_path / "exported").splitlines()[0]
    launch.check_deltas(str(folders[0]), [f"x={tmp_path / 'exported'}"], deltas[2])
    with pytest.raises(UserError, match=r"is compressed; `liftdist export .* --format delta .* writes it whole"):
        launch.check_deltas(str(folders[0]), [f"x={path}"], deltas[2])
    liftdist("export", path, "--base", folders[0], "--format", "hf", "--output", tmp_path / "hf", *at)
    assert json.loads((tmp_path / "hf" / "liftdist.json").read_text())["made"]["compressed"] == method
    weights = [{k: v for k, v in builders.contents(f).items() if "_proj" in k} for f in (tmp_path / "hf", tuned)]
    assert weights[0] == weights[1]
    for format in ("patch", "shira"):
        for source, name in ((path, "a"), (tmp_path / "plain", "b")):
            out = tmp_path / f"{format}-{name}"
            liftdist("export", source, "--base", folders[0], "--format", format, "--output", out, *at)
        files = [tmp_path / f"{format}-{name}" for name in "ab"]
        a, b = (load_file(f / "adapter_model.safetensors" if f.is_dir() else f) for f in files)
        assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())
    card = liftdist("push", path, "me/delta", "--dry-run", "--base", folders[0], *at)
    assert f"compressed: {method}" in card
    assert f"{path.stat().st_size:,}  delta.safetensors" in card
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"is compressed; give it with the folder of its base model"):
        change_module(model, delta_file.read(path))
    change_module(model, difference.on(delta_file.read(path), ModelFolder(folders[0])))
    after = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.bfloat16)
    assert all(torch.equal(bits(param), bits(after.get_parameter(name))) for name, param in model.named_parameters())


@pytest.mark.parametrize("budget", [0.12, 0.5, 1])
def test_a_budget_is_one_of_the_whole_file(budget, deltas, tmp_path):
    words = ("--method", "flex_switch", "--budget", budget, "--output", tmp_path / "x", "--cache-dir", deltas[2])
    liftdist("compress", deltas[0], *words)
    assert (tmp_path / "x").stat().st_size <= budget * deltas[0].stat().st_size


def test_what_cannot_be_compressed_or_read_is_refused(folders, deltas, small, tmp_path):
    at, out = ("--cache-dir", deltas[2]), tmp_path / "out"
    liftdist("diff", *folders[:2], "--output", tmp_path / "slim", "--without-base", *at)
    for words, problem in (
        ((deltas[0], "--method", "t_switch"), "--method t_switch: needs --alpha"),
        ((deltas[0], "--alpha", 0.5), "--alpha: --method exact has no such option; it takes none"),
        ((deltas[0], "--method", "t_switch", "--alpha", 1), "--alpha 1: must be at least 0 and below 1"),
        ((deltas[0], "--method", "t_switch", "--alpha", "nan"), "--alpha nan: must be"),
        ((deltas[0], "--method", "flex_switch", "--budget", 1e-6), "hold nothing of the delta; give a larger share"),
        ((tmp_path / "slim",), "holds no base values, from which changes are told; give --base"),
        ((small["exact"][0],), "its values depend on the base model; give --base"),
        ((deltas[0], "--base", folders[1]), "is not the base model of"),
        ((folders[0],), "Is a directory"),
    ):
        said = liftdist("compress", *words, "--output", out, *at, code=2)
        assert problem in said.splitlines()[-1], said
        assert not list(tmp_path.glob("*out*"))
    liftdist("compress", tmp_path / "slim", "--base", folders[0], "--output", out, *at)
    said = liftdist("merge", small["exact"][0], deltas[1], "--rule", "sum", "--output", tmp_path / "m", *at, code=2)
    assert "is compressed, so that its values depend on the base model; give --base" in said
    data = bytearray(out.read_bytes())
    data[-20] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    assert "do not match the sha256" in liftdist("show", tmp_path / "damaged", code=2)


def test_a_step_that_overflows_is_left_out_and_refused(small):
    near = torch.full((6,), 65504.0, dtype=torch.float16)  # the largest
    shrinks = torch.tensor([-9e3, -1e3, -2e3, 0, 0, 0])
    near[3:] -= 200
    change = Change(
        (3, 2), torch.float16, torch.arange(6), (near + shrinks + torch.tensor([0, 0, 0, 1, 1, 1]) * 64).half(), near
    )
    found, _ = t_switch.quantised(change, 0.0, 1)
    assert found.applied(near[found.indices]).values.isfinite().all()
    assert found.indices.tolist() == [0, 1, 2]
    read = delta_file.read(small["t_switch"][0])
    name = read.names[0]
    found = read.get(name)
    huge = dataclasses.replace(found, steps=found.steps.abs().sign() * 2e38)
    with pytest.raises(UserError, match="becomes a value that is not finite"):
        edit(name, torch.full(found.shape, 3e38, dtype=torch.bfloat16), [], [huge])
