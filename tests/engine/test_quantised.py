"""Frozen weights in 8 and 4 bits: what they are rounded to, exact weights over them, training as on a dense model of the same."""

from unittest import mock

import builders
import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from liftdist import PrincipalWeights
from liftdist.engine import quantisation, quantised
from liftdist.engine.adamw import PrincipalAdamW
from liftdist.engine.matrices import principal_matrices
from liftdist.engine.quantisation import NF4, Format
from liftdist.engine.quantised import QuantisedRows, QuantisedTensor, unpack
from liftdist.model_settings import ModelConfig
from liftdist.models.load import load

KINDS = ("int8", "fp8", "nf4")
STEPS, REFRESH = 20, 8


def by_hand(rows, kind):
    """Each weight to the nearest level times its scale, one by one."""
    levels = {
        "int8": torch.arange(-127.0, 128) / 127,
        "nf4": torch.tensor(NF4),
        "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / 448,
    }[kind]
    levels = levels[levels.isfinite()].unique()
    result = rows.float().clone()
    for row in result:
        for block in row.split(len(row) if kind == "fp8" else 64):
            units = block / block.abs().max() if block.any() else block
            block.copy_(levels[(units[:, None] - levels).abs().argmin(1)] * block.abs().max())
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [128, 100])
def test_weights_are_the_nearest_levels_of_their_block(kind, columns):
    rows = torch.randn(30, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    rows[3] = 0
    found, wanted = Format(kind, columns).rounded(rows), by_hand(rows, kind)
    largest = torch.stack([rows.abs().amax(1)] * columns, 1)
    # as near, but that scales are rounded to bfloat16
    assert ((found - rows).abs() <= (wanted - rows).abs() + largest / 200).all()
    assert (found - rows).norm() <= 1.1 * (wanted - rows).norm()
    assert torch.equal(found[3], rows[3])
    assert torch.equal(Format(kind, columns).rounded(rows[7:9]), found[7:9])  # rows apart
    rounded = Format(kind, columns).rounded(rows.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - rows).norm() <= 1.2 * (wanted - rows).norm()


class Divisors(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket == torch.ops.aten.div:
            self.found.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scales_are_quotients_on_any_device(kind):
    """A GPU takes the product with the reciprocal for a division by a Python number."""
    rows = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    with Divisors() as divisors:
        _, scales = Format(kind, 128).quantise(rows)
    assert len(divisors.found) == 2
    assert all(isinstance(divisor, torch.Tensor) for divisor in divisors.found)
    largest = rows.view(300, scales.shape[1], -1).abs().amax(2)
    assert torch.equal(scales, (largest / {"int8": 127, "fp8": 448}[kind]).bfloat16())


def test_levels_are_made_once(monkeypatch):
    """For a GPU the host would wait for them in each gather. Those of fake tensors are not kept."""
    monkeypatch.setattr(quantisation, "_PAIRS", {})
    format, rows = Format("nf4", 64), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with FakeTensorMode():
        format.rounded(torch.empty(5, 64))
    codes, scales = format.quantise(rows)
    found = format.dequantise(codes, scales, torch.empty(5, 64))
    monkeypatch.delattr(torch, "tensor")
    assert torch.equal(format.dequantise(codes, scales, torch.empty(5, 64)), found)
    with FakeTensorMode(allow_non_fake_inputs=True):
        format.dequantise(codes, scales, torch.empty(5, 64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [128, 100])
def test_exact_weights_stay_exact_over_quantised_ones(kind, dtype, columns):
    """Through additions, fewer and more entries than other shards, and distances beyond a byte; written in order, as weights that
    are trained are, or not, as those of matrices whose columns alternate."""
    random = torch.Generator().manual_seed(0)
    base = (torch.randn(37, columns, generator=random) * 0.02).to(dtype)
    held = QuantisedRows(kind, columns, 40, 37, dtype, torch.device("cpu"))
    held.fill(0, base[:20])
    held.fill(20, base[20:])

    def original(positions):
        assert (positions.diff() > 0).all()  # as they are read from files
        return base.view(-1)[positions.long()]

    held.original = original
    now = Format(kind, columns).rounded(base)
    assert torch.equal(held.dense(), now)
    flat, ever = now.view(-1), torch.zeros(37 * columns, dtype=torch.bool)

    def gathered():
        """What FSDP makes of two shards alike, the first time and later."""
        local, two = QuantisedTensor(held, (40, columns)), held.buffer.repeat(2)
        whole, _ = local.fsdp_post_all_gather((two.clone(),), held.sections, dtype)
        out = torch.nn.Parameter(torch.empty_like(whole))
        local.fsdp_post_all_gather((two,), held.sections, dtype, out=out)
        assert torch.equal(whole, out)
        return whole

    for number, room, is_ordered in ((60, 0, True), (5, 7, True), (900, 0, False), (700, 0, True), (0, 3, True)):
        chosen = torch.randperm(37 * columns, generator=random)[:number].int()
        chosen = chosen.sort().values if is_ordered else chosen
        held.lay_out(held.add(chosen) + room)
        new = chosen.long()[~ever[chosen.long()]]
        flat[new] = base.view(-1)[new]
        ever[new] = True
        assert torch.equal(held.read(chosen), flat[chosen.long()])
        for positions in (chosen, chosen.clone()):
            learned = torch.randn(number, generator=random)
            held.write(positions, learned)
            flat[positions.long()] = learned.to(dtype)
            assert torch.equal(held.dense(), now)
        assert torch.equal(held.dense(5, 9), now[5:9])
        for begin, end in ((0, 37), (5, 9), (0, 1), (36, 37), (4, 4)):
            out = torch.empty(end - begin, columns, dtype=dtype)
            assert torch.equal(unpack(held.packed(begin, end), held.format, out), now[begin:end])
        assert torch.equal(held.read(torch.arange(37 * columns).int()), flat)
        whole = gathered()
        assert torch.equal(whole[:37], now)
        assert torch.equal(whole[40:77], now)
    with pytest.raises(RuntimeError, match="make it exact first"):
        held.write((~ever).nonzero()[:1, 0].int(), torch.zeros(1))


def test_a_shard_without_exact_weights_has_as_many_entries_as_the_others():
    held = QuantisedRows("nf4", 64, 4, 0, torch.float32, torch.device("cpu"))  # nor has it rows
    assert held.add(torch.empty(0, dtype=torch.int32)) == 0
    held.lay_out(5)
    assert not held.dense().numel()
    assert (
        not QuantisedTensor(held, (4, 64)).fsdp_post_all_gather((held.buffer,), held.sections, torch.float32)[0].any()
    )


def test_bytes_a_weight():
    for kind, most in (("nf4", 0.30), ("int8", 0.55), ("fp8", 0.51)):
        held = QuantisedRows(kind, 576, 100, 100, torch.bfloat16, torch.device("cpu"))
        assert held.buffer.nbytes <= most * 100 * 576 * 2


def rounded_copy(folder, source, kind):
    """A checkpoint whose matrices hold the values to which ``kind`` rounds those of ``source``."""
    model = builders.frozen_model(source)
    stored = load_file(source / "model.safetensors")
    for name, place in principal_matrices(model).items():
        stored[name] = Format(kind, place.width).rounded(stored[name])
    builders.llama(folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def trained(mesh, folder, kind, dense, true):
    """Losses and trained weights of twenty steps with two refreshes on a quantised base, or on a dense one of the same values."""
    config = ModelConfig(path=str(folder), dtype="float32", base_dtype=None if dense else kind)
    model, _ = load(folder, config, mesh)
    principal = PrincipalWeights(model, density=0.1, filter_rank=4, replicate_group=mesh.replicate_group)
    optimizer = PrincipalAdamW(principal, lr=3e-3)
    assert principal.is_quantised != dense
    ever = [torch.zeros(matrix.numel_local, dtype=torch.bool) for matrix in principal.matrices]

    def begin_at_true_values():
        """Of what is selected for the first time: by itself where the base is quantised."""
        values = []
        for matrix, flags, indices in zip(principal.matrices, ever, principal.indices, strict=True):
            whole = true[matrix.name].view(-1)
            mine = matrix.read(indices)
            new = ~flags[indices]
            mine[new] = whole[indices.long()[new] + matrix.offset_local]
            values.append(mine)
            flags[indices] = True
        if dense:
            with torch.no_grad():
                principal.values.copy_(torch.cat(values))
            principal.write_back()
        assert torch.equal(principal.values, torch.cat(values))

    begin_at_true_values()
    losses = []
    for step in range(STEPS):
        if step and step % REFRESH == 0:
            principal.refresh(optimizer)
            begin_at_true_values()
        random = torch.Generator().manual_seed(step % 2 + 10 * mesh.rank)
        tokens = torch.randint(3, 257, (2, 24), generator=random)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        principal.reduce_gradients(mesh.world_size)
        principal.clip_grad_norm_(1.0)
        optimizer.step()
        losses.append(loss.item())
    rows = {m.name: m.rows_local.clone() for m in principal.matrices}
    return losses, principal.state_dict(optimizer), rows


@pytest.mark.parametrize(
    ("world_size", "replicas", "kind"), [(1, 1, "int8"), (2, 1, "nf4"), (3, 1, "fp8"), (3, 1, "nf4"), (4, 2, "int8")]
)
def test_trains_as_on_a_dense_model_of_the_rounded_weights(world_size, replicas, kind, tmp_path):
    """To the bit, with refreshes; matrices of 93, 50, 30 and 6 rows are shared unevenly by 2 and 3 ranks."""
    base = builders.llama(tmp_path / "base")
    true = load_file(base / "model.safetensors")
    rounded = rounded_copy(tmp_path / "rounded", base, kind)
    found = ranks.run(world_size, trained, base, kind, False, true, dp_replicate=replicas)
    wanted = ranks.run(world_size, trained, rounded, kind, True, true, dp_replicate=replicas)
    for (losses, state, rows), (dense_losses, dense_state, dense_rows) in zip(found, wanted, strict=True):
        assert losses == dense_losses
        assert losses[-1] < losses[0]
        assert state.keys() == dense_state.keys()
        assert any(value.numel() for key, value in state.items() if key.endswith("dropped_values"))
        assert all(torch.equal(value, dense_state[key]) for key, value in state.items())
        assert all(torch.equal(value, dense_rows[name]) for name, value in rows.items())


def sent_by_selections(mesh, folder, kind):
    """Bytes that this rank sends for a first selection and a refresh, and what they say is exact and how the rest is kept."""
    model, _ = load(folder, ModelConfig(path=str(folder), dtype="bfloat16", base_dtype=kind), mesh)
    sent, exchange = [], dist.all_to_all_single

    def counting(received, given, *others, **named):
        if given.dtype == torch.uint8:
            sent[-1] += given.nbytes
        return exchange(received, given, *others, **named)

    with mock.patch.object(dist, "all_to_all_single", counting):
        sent.append(0)
        principal = PrincipalWeights(model, density=0.1, filter_rank=4, replicate_group=mesh.replicate_group)
        exact = [sum(quantised.held_by(matrix.param)._number for matrix in principal.matrices)]
        sent.append(0)
        principal.refresh()
    kept = sum(
        matrix.numel_local // matrix.columns * Format(kind, matrix.columns).row_bytes for matrix in principal.matrices
    )
    return sent, [kept, kept + 3 * exact[0]], sum(matrix.numel_local for matrix in principal.matrices)


@pytest.mark.parametrize("kind", KINDS)
def test_a_selection_gathers_rows_as_they_are_kept(kind, tmp_path):
    base = builders.llama(
        tmp_path / "base",
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    weights = 0
    for sent, expected, numel in ranks.run(3, sent_by_selections, base, kind):
        assert sent == expected
        weights += numel
        assert sent[0] < {"nf4": 0.27, "int8": 0.52, "fp8": 0.51}[kind] * 2 * numel
    stored = load_file(base / "model.safetensors")
    assert weights == sum(tensor.numel() for name, tensor in stored.items() if name.endswith("_proj.weight"))
