"""The principal weights of a model as one flat vector that any element-wise optimizer can step.

For matrix j this rank holds rows W_j [m_j, n] (a shard, or all of it) and sorted flat indices S_j into them:

    values     = concat over j of W_j.flat[S_j]            float32, the optimizer's only parameter      16 B with grad
    values.grad= concat over j of dL/dW_j.flat[S_j]        float32, never rounded after the reduction   and two moments
    positions  = concat over j of S_j                      int32, in the memory of the parameter         4 B

With ``device="cpu"`` all three are on the host, and optimizers that run there step the values: see host.py for what travels.

With ``dtype=torch.bfloat16`` the values and the moments take 2 B each: updates that bf16 rounds away are lost, as where
bf16 weights are trained without master values.

A parameter none of whose weights are selected requires no gradient until a refresh selects some: autograd computes none for it,
and stops below the lowest that does.

Backward: as soon as the gradient of a layer is reduced, a hook adds its principal entries to ``values.grad`` and drops
the dense gradient. Step: any optimizer on ``values``, then ``write_back`` rounds the values into the model's weights.

Weights that a refresh deselects keep their trained value, in the model only. From the first refresh on, one bit per weight of
the trained matrices marks previously selected weights: they are part of what a run has changed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from liftdist.distributed.collectives import Group, all_reduce_sum, together
from liftdist.distributed.sharding import fsdp_modules, local_tensor, reshard
from liftdist.engine import host, optimizer_states, quantised, reductions
from liftdist.engine.base_values import BaseValues
from liftdist.engine.budgets.per_matrix import PerMatrix
from liftdist.engine.clip import clip_grad_norm_
from liftdist.engine.criteria.low_rank import LowRank
from liftdist.engine.flat import Part, Segment, former, lay_out
from liftdist.engine.gathered import Backwards
from liftdist.engine.matrices import (
    Matrix,
    check_alike,
    default_replicate_group,
    describe,
    principal_matrices,
    shard_group,
)
from liftdist.engine.selection import Budget, Criterion, Excluded
from liftdist.engine.selector import Selector, is_of_selector
from liftdist.errors import UserError

TRIAL_BATCHES = 8  # by which a budget learns

#: The instance whose hook takes the gradient of a parameter. Keeps neither alive.
_taken: MutableMapping[Tensor, weakref.ref[PrincipalWeights]] = WeakTensorKeyDictionary()


class PrincipalWeights:
    """Selects the principal weights of ``model``, freezes everything else, and trains them as one flat vector.

    Args:
        model: any module on its device: plain, or sharded by FSDP2 (``fully_shard``), before its first forward.
            Do not wrap it in DDP: :meth:`reduce_gradients` synchronises replicas by their principal entries only.
        density: share of each matrix to train. Give either this or ``budget_rank``.
        budget_rank: ``R``: train ``min(R (m + n), m n)`` weights of each ``[m, n]`` matrix.
        filter_rank: rank ``r`` of the approximation whose largest entries are selected.
        method: ``"fast"`` or ``"exact"``, see :func:`liftdist.engine.criteria.low_rank.select`.
        modules: patterns of the names of the linear modules to train; all except the output head by default.
        criterion: replaces the low-rank criterion, see :class:`liftdist.engine.selection.Criterion`.
        budget: replaces ``density`` and ``budget_rank``, see :class:`liftdist.engine.selection.Budget`.
        excluded: weights that are never selected, see :data:`liftdist.engine.selection.Excluded`. A matrix with too few others
            trains them all; under a budget that compares matrices the rest goes to the others.
        replicate_group: ranks that hold the same rows of other replicas. By default all ranks where the model is not
            sharded, and none where it is sharded over all ranks.
        initial_indices: a function that returns ``[k_local]`` int32 for each of :attr:`matrices`, which replace the first
            selection, or None, on all ranks, to select.
        dtype: of the values and, with them, of the optimizer's element-wise states: float32, which keeps what weights in bf16
            would round away, or bfloat16, for a model in bfloat16. Gradients are float32 either way, which torch's own
            optimizers do not step bfloat16 values by: take :class:`liftdist.engine.adamw.PrincipalAdamW`.
        device: ``"cpu"`` keeps values, gradient and positions on the host; an optimizer of :attr:`values` steps them there. By
            default they are where the model is.
        multiple_of: pad the flat vector with zeros to a multiple of this. Optimizers that quantise their state in blocks,
            such as torchao's, do not quantise vectors of other lengths.
        sparse_reduce_scatter: exchange only the principal entries of gradients between FSDP2 shards. The modules keep this
            reduction after this object is deleted: another ``PrincipalWeights`` may follow, dense training must not.
        keep_base: keep the values that trained weights had in the model, for :attr:`base_values`, :meth:`at_base` and
            :meth:`leave`.
        progress: called with the number of matrices selected and their total.
        on_selected: called in the first selection, on the rank that factored a matrix, with its name and all its indices.
        backwards: for a criterion by gradients, see :data:`liftdist.engine.gathered.Backwards`.

    Raises:
        ValueError: nothing to train, a sharding that is not by rows, weights that are not finite (named), a model that
            has principal weights already, a setting out of range, bfloat16 values of other weights, another device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        density: float | None = None,
        budget_rank: int | None = None,
        filter_rank: int = 64,
        method: str = "fast",
        modules: Sequence[str] = ("*",),
        criterion: Criterion | None = None,
        budget: Budget | None = None,
        excluded: Excluded | None = None,
        replicate_group: Group = None,
        initial_indices: Callable[[PrincipalWeights], list[Tensor] | None] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        multiple_of: int = 1,
        sparse_reduce_scatter: bool = True,
        keep_base: bool = False,
        progress: Callable[[int, int], None] | None = None,
        on_selected: Callable[[str, Tensor], None] | None = None,
        backwards: Backwards | None = None,
    ) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "pass the module without DistributedDataParallel: reduce_gradients() synchronises replicas"
            )
        if multiple_of < 1:
            raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
        places = principal_matrices(model, modules)
        trained = list({id(place.param): place.param for place in places.values()}.values())
        _check_free(trained)
        # those of a parameter adjacent, in the order in which the model names parameters
        order = {id(param): number for number, param in enumerate(trained)}
        found = sorted(places.items(), key=lambda item: order[id(item[1].param)])
        self.matrices = [describe(name, place) for name, place in found]
        rules = criterion or LowRank(filter_rank, method), budget or PerMatrix(density, budget_rank)
        self.selector = Selector(self.matrices, *rules, excluded, progress, backwards)
        self.counts = self.selector.allotted  # principal weights of each whole matrix
        if not sum(self.counts) and self.selector.is_known:
            share = f"budget rank {budget_rank}" if density is None else f"density {density}"
            asked = share if budget is None else f"the budget {budget}"
            raise UserError(f"nothing to train: {asked} selects no weight of any matrix; ask for more")
        check_alike(self.matrices)
        self.dtype = dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be float32 or bfloat16, got {dtype}")
        if dtype == torch.bfloat16 and (others := [m for m in self.matrices if m.dtype != dtype]):
            raise ValueError(f"dtype bfloat16 is for bfloat16 weights: {others[0].name} has {others[0].dtype}")
        self.device = self.matrices[0].device  # of the model
        self.is_on_host = device is not None and torch.device(device).type == "cpu"
        if device is not None and not self.is_on_host:
            raise ValueError(f"device must be cpu, or None for that of the model, got {device}")
        self._arrivals = host.Arrivals()
        kept = {id(param) for param in trained}
        for param in model.parameters():
            param.requires_grad_(id(param) in kept)
        self.shard_group = shard_group(self.matrices[0].param)
        self.replicate_group = replicate_group or default_replicate_group(self.matrices[0].param)
        self._multiple_of = multiple_of
        self._base = BaseValues() if keep_base else None
        self._is_at_base = self._has_left = False
        self._fsdp_modules = fsdp_modules(model)
        self._sparse_reduce_scatter = sparse_reduce_scatter

        self._reductions = reductions.watch(
            self._fsdp_modules, trained, sparse_reduce_scatter
        )  # by id of the parameter
        reductions.renew(self._fsdp_modules)
        indices = initial_indices(self) if initial_indices else None
        self._lay_out(indices if indices is not None else self.select(on_selected))
        if indices is None and not self.num_selected:
            raise UserError(f"nothing to train: {self.selector.criterion} selects no weight of any matrix")
        self.values = nn.Parameter(self._read_shards())
        self.values.grad_dtype = None  # float32, whatever the dtype of the values is
        self._grad = torch.zeros_like(self.values, dtype=torch.float32)
        self.values.grad = self._grad
        for number, part in enumerate(self.parts):
            part.param.register_post_accumulate_grad_hook(_hook(self, number))
            _taken[part.param] = weakref.ref(self)
        self._require_gradients(self.counts)

    def select(self, on_selected: Callable[[str, Tensor], None] | None = None) -> list[Tensor]:
        """Principal indices of the current weights, ``[k_local]`` int32 for each matrix. Collective."""
        is_first = not hasattr(self, "values")
        trained = self._movements() if self.selector.replaces and not is_first else None
        if not is_first:  # a criterion may gather gradients
            self._require_gradients([1] * len(self.matrices))
        return self.selector.select(self.shard_group, self.replicate_group, self._reductions, on_selected, trained)

    def _movements(self) -> dict[int, tuple[Tensor, Tensor]]:
        base, values = self._kept_base().of(self.parts), self.values.detach().float()
        pairs = zip(self.parts, base, strict=True)
        return {
            id(part.param): (part.positions, values[part.span].to(part.device) - before.float())
            for part, before in pairs
        }

    def check_excluded(self) -> None:
        """Raises ``UserError`` if a weight that must not be selected was, before it was excluded. Collective."""
        excluded = self.selector.excluded
        with together():
            for segment in self._segments if excluded is not None else ():
                assert excluded is not None
                matrix = segment.matrix
                if segment.selected_ever()[matrix.cut(excluded(matrix))].any():
                    raise UserError(f"{matrix.name}: weights that are to be excluded have been trained already")

    @property
    def is_quantised(self) -> bool:
        """Whether the model keeps weights that are not trained in fewer bits."""
        return any(quantised.held_by(matrix.param) is not None for matrix in self.matrices)

    @property
    def num_selected(self) -> int:
        """Principal weights of all matrices."""
        return sum(self.counts)

    @property
    def indices(self) -> list[Tensor]:
        """For each of :attr:`matrices`, ``[k_local]`` int32 sorted flat indices into this rank's rows."""
        return [segment.indices for segment in self._segments]

    def reduce_gradients(self, divisor: Tensor | float | None = None) -> None:
        """Sum the flat gradient over the replicas and divide it: by ``divisor``, or by the number of replicas."""
        for reduction in self._reductions.values():
            reduction.drop()  # left over if a matrix of the module took no part in the backward
        grad = self._attached_grad()
        if grad.device == self.device or self.replicate_group is None:
            all_reduce_sum(grad, self.replicate_group)
        else:  # by way of the device, whose links are the faster ones
            for entries in (grad[part.span] for part in self.parts):
                entries.copy_(all_reduce_sum(host.sent(entries, self.device, entries.dtype), self.replicate_group))
        if divisor is None:
            divisor = 1 if self.replicate_group is None else self.replicate_group.size()
        grad.div_(divisor.to(grad.device) if isinstance(divisor, Tensor) else divisor)

    def clip_grad_norm_(self, max_norm: float | None) -> Tensor:
        """Scale the gradient so that its norm over all shards is at most ``max_norm``; return the norm before.

        If the norm is not finite, the gradient is left unchanged for the caller to handle.
        """
        return clip_grad_norm_([self._attached_grad()], max_norm, self.shard_group, self.device)

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the values into the model's weights, rounded to their dtype, and clear the flat gradient."""
        gradient = self._attached_grad()
        for part in self.parts:
            values = self.values[part.span]
            part.write(part.kept, host.sent(values, part.device, part.param.dtype) if self.is_on_host else values)
        gradient.zero_()
        self.written_back()

    def written_back(self) -> None:
        """To be called by code that wrote the values into the model's weights and cleared the flat gradient itself."""
        reshard(self._fsdp_modules)  # copies gathered earlier, for example by an evaluation, are stale

    @property
    def base_values(self) -> Tensor:
        """``[k_local]`` in the dtype of the model: what the principal weights were in the base model, in the order of ``values``.

        Raises:
            ValueError: ``keep_base`` was not set.
        """
        return self._flat(self._kept_base().of(self.parts))

    @contextlib.contextmanager
    def at_base(self) -> Iterator[None]:
        """Within the context the model is the base model; afterwards the trained one again, to the bit. Gradients stay.

        For forwards without gradients. What reads or changes the trained weights, their gradient or :attr:`base_values` raises
        ``RuntimeError`` there: a backward, a step, :meth:`refresh`, :meth:`state_dict`, another ``at_base``, ...

        Raises:
            ValueError: ``keep_base`` was not set.
        """
        base, self._is_at_base = self._kept_base(), True
        try:
            with base.swapped_in(self.parts):
                self.written_back()
                yield
        finally:
            self._is_at_base = False
            self.written_back()

    def leave(self) -> None:
        """Give the model its base weights back, for other principal weights of it: to be made now, or to :meth:`enter`.

        Values, gradient, optimizer and previous selections stay with this object. Until it enters again what reads or changes
        them raises ``RuntimeError``, and backwards leave its gradient alone.

        Raises:
            ValueError: ``keep_base`` was not set; the model is quantised, where what was trained once stays exact.
        """
        if self.is_quantised:
            raise ValueError(
                "principal weights cannot leave a quantised model: it would not be what it was before them"
            )
        self._kept_base().swap(self.parts)
        self._has_left = True
        for part in self.parts:
            del _taken[part.param]
            part.param.requires_grad_(False)
        self.written_back()

    def enter(self) -> None:
        """After :meth:`leave`: the model is the trained one again, to the bit, and its gradients are taken.

        Raises:
            ValueError: other principal weights have not left.
        """
        if not self._has_left:
            return
        assert self._base is not None
        params = [part.param for part in self.parts]
        _check_free(params)
        self._reductions = reductions.watch(self._fsdp_modules, params, self._sparse_reduce_scatter)
        for part in self.parts:
            part.reduction = self._reductions.get(id(part.param))
            if part.reduction is not None:
                part.reduction.choose(part.param, part.kept)
            _taken[part.param] = weakref.ref(self)
        self._base.swap(self.parts)
        self._has_left = False
        self._require_gradients(self.counts)
        self.written_back()

    def check_not_at_base(self) -> None:
        """To be called by code that is about to step the values. Raises ``RuntimeError`` within :meth:`at_base`, and after
        :meth:`leave`."""
        if self._has_left:
            raise RuntimeError(
                "these principal weights have left the model: enter() it to train, refresh, save or load"
            )
        if self._is_at_base:
            raise RuntimeError("the model is the base model within at_base(): leave it to train, refresh, save or load")

    def _kept_base(self) -> BaseValues:
        self.check_not_at_base()
        if self._base is None:
            raise ValueError("base values are kept with PrincipalWeights(keep_base=True) only")
        return self._base

    @torch.no_grad()
    def refresh(self, optimizer: torch.optim.Optimizer | None = None, number: int | None = None) -> float:
        """Reselect from the current weights and carry the optimizer's state over. Call it before a forward. Collective.

        Weights that stay selected keep value and state; deselected ones keep their trained value; newly selected ones start
        from the value in the model and zero state.

        Args:
            number: of this refresh, counted from 1, where it is not one more than that of the last. Matters to what is drawn
                anew, and to schedules.

        Returns:
            The share of the principal weights that stayed selected, over the whole model.

        Raises:
            ValueError: the optimizer holds state that is neither a scalar nor of the shape of ``values``.
            UserError: nothing is left to train.
        """
        self.check_not_at_base()
        states = optimizer_states.of_elements(optimizer, self.values)
        old_segments, old_parts, old_values = self._segments, self.parts, self.values.detach()
        with self.selector.advanced(number, self._loss_of):
            chosen = self.select()
        self._lay_out(chosen)
        if not self.num_selected:
            raise UserError(f"nothing is left to train: {self.selector.criterion} selects no weight of any matrix")
        for old, new in zip(old_segments, self._segments, strict=True):
            new.past = old.past_and_present()
        if self.selector.replaces:
            self._restore_base(old_parts)
        # [k_local] place of each new entry in the old vector, -1 if it was not selected
        source = self._flat((former(old, new) for old, new in zip(old_segments, self._segments, strict=True)), -1)
        stayed = source >= 0
        values = self._read_shards()
        values[stayed] = old_values[source[stayed]]
        self._replace_values(values)
        begun = self._gathered_states(optimizer)
        for state, key in states:
            before = optimizer_states.dense(state[key])
            moved = begun.get(key, torch.zeros_like(values)).to(before.dtype)
            moved[stayed] = before[source[stayed]]
            state[key] = optimizer_states.in_own_format(optimizer, key, self.values, moved)
        selected = sum(segment.kept.numel() for segment in self._segments)
        count = torch.stack([stayed.sum().to(self.device), torch.tensor(selected, device=self.device)])
        kept, total = all_reduce_sum(count, self.shard_group).tolist()
        return kept / max(total, 1)

    def _loss_of(self, factor_of: Callable[[str], float]) -> float:
        """The mean loss over batches where what each matrix has learned is multiplied by its factor. Equal on all ranks."""
        assert self.selector.backwards is not None
        names = {id(matrix.param): matrix.name for matrix in self.matrices}
        with self._kept_base().scaled(self.parts, [factor_of(names[id(part.param)]) for part in self.parts]):
            self.written_back()
            parts = list(self.selector.backwards(TRIAL_BATCHES))
        self.written_back()
        total = all_reduce_sum(torch.stack(parts).double().sum(), self.shard_group, self.replicate_group)
        replicas = 1 if self.replicate_group is None else self.replicate_group.size()
        return total.item() / len(parts) / replicas

    def _restore_base(self, former: Sequence[Part]) -> None:
        """Give weights of ``former`` that are not selected now their base values back."""
        for old, new, values in zip(former, self.parts, self._kept_base().of(former), strict=True):
            left = ~torch.isin(old.positions, new.positions)
            old.write(old.positions[left], values[left])
        self.written_back()

    def _gathered_states(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """Optimizer states ``[k_local]`` from the gradients that a criterion that replaces has gathered, which are freed."""
        sums, self.selector.gathered = self.selector.gathered, {}
        if not sums:
            return {}
        number = self.selector.criterion.batches  # type: ignore[attr-defined]
        pairs = [(sums[id(part.param)], part.positions) for part in self.parts]

        def of_first_replica(entries: Tensor) -> Tensor:  # each gathers its own, which may round differently
            if self.replicate_group is not None:
                dist.broadcast(entries, group=self.replicate_group, group_src=0)
            return entries

        mean, square = (
            self._flat(of_first_replica(states[place].index_select(0, where)) for states, where in pairs) / number
            for place in (0, 1)
        )
        return optimizer_states.gathered(optimizer, self.values, mean, square, number)

    @torch.no_grad()
    def state_dict(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
        """What this rank holds beyond the base model, copied to the host. Indices are into the whole matrix, so that a state
        saved at one world size can be resharded to another.

        Returns:
            For each matrix ``NAME``, of this rank's rows: ``NAME/indices`` ``[k]`` int32 (int64 in a matrix of 2^31
            weights or more), sorted; ``NAME/values`` ``[k]`` in :attr:`dtype`; ``NAME/optimizer.KEY`` ``[k]`` for each
            element-wise state of the optimizer; ``NAME/dropped_indices`` ``[d]``, sorted, and ``NAME/dropped_values``
            ``[d]`` in the dtype of the model, for previously selected weights.
        """
        self.check_not_at_base()
        flat = {"values": self.values.detach()}
        flat |= {
            f"optimizer.{key}": optimizer_states.dense(state[key])
            for state, key in optimizer_states.of_elements(optimizer, self.values)
        }
        flat = {key: tensor.to("cpu", copy=True) for key, tensor in flat.items()}
        result: dict[str, Tensor] = {}
        for segment in self._segments:
            matrix, dropped = segment.matrix, segment.dropped
            dtype = torch.int32 if matrix.numel < 2**31 else torch.int64
            whole = {"indices": segment.indices, "dropped_indices": dropped}
            for key, local in whole.items():
                result[f"{matrix.name}/{key}"] = (local.long() + matrix.offset_local).to(dtype).cpu()
            result[f"{matrix.name}/dropped_values"] = matrix.read(dropped).cpu()
            for key, tensor in flat.items():
                result[f"{matrix.name}/{key}"] = tensor[segment.span]
        return result

    @torch.no_grad()
    def load_state_dict(
        self,
        state: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer | None = None,
        scalars: Mapping[str, float] | None = None,
    ) -> None:
        """Load what :meth:`state_dict` returned, cut to this rank's rows, into a model that holds the base weights.

        Exact, except for quantised optimizer states: they are saved in float32 and quantised again.

        Args:
            scalars: the optimizer's scalar states, such as Adam's ``step``, and the selection's, see :meth:`scalar_states`.
        """

        def local(matrix: Matrix, key: str) -> Tensor:
            return state[f"{matrix.name}/{key}"].long() - matrix.offset_local

        self.check_not_at_base()
        self.selector.load_scalars(scalars or {})
        if self._base is not None:
            self._base = BaseValues()
        if self._base is not None or self.is_quantised:
            self._lay_out([local(matrix, "dropped_indices") for matrix in self.matrices])
        self._lay_out([local(matrix, "indices") for matrix in self.matrices])
        for segment in self._segments:
            matrix = segment.matrix
            dropped = local(matrix, "dropped_indices")
            if dropped.numel():
                dropped = dropped.to(matrix.device)
                matrix.write(dropped, state[f"{matrix.name}/dropped_values"])
                segment.past = Segment(matrix, matrix.positions(dropped), 0).past_and_present()

        def flat(key: str) -> Tensor:
            return self._flat(state[f"{matrix.name}/{key}"] for matrix in self.matrices)

        self._replace_values(flat("values").to(self.dtype))  # a state may have been saved in the other one
        self.write_back()
        keys = {key.partition("/optimizer.")[2] for key in state if "/optimizer." in key}
        own = {key: torch.tensor(value) for key, value in (scalars or {}).items() if not is_of_selector(key)}
        if optimizer is not None and (keys or own):
            elements = {key: flat(f"optimizer.{key}") for key in keys}
            settings = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": {0: elements | own}, "param_groups": settings})
            kept = optimizer.state[self.values]
            kept |= {key: optimizer_states.in_own_format(optimizer, key, self.values, kept[key]) for key in keys}

    def scalar_states(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """The optimizer's scalar states, how often the weights were selected anew, and what the budget has learned, equal on all
        ranks: the ``scalars`` of :meth:`load_state_dict`."""
        return optimizer_states.scalars(optimizer, self.values) | self.selector.scalars()

    def non_finite(self) -> list[str]:
        """Names of the matrices whose principal gradient on this rank is not finite."""
        grad = self._attached_grad()
        return [segment.matrix.name for segment in self._segments if not grad[segment.span].isfinite().all()]

    def drop_gradients(self) -> None:
        """Clear the flat gradient, as if there had been no backward."""
        self._arrivals.drop()
        self._attached_grad().zero_()

    def _replace_values(self, values: Tensor) -> None:
        self.values.grad = None  # before the length changes
        self.values.data = values
        self._grad = torch.zeros_like(self.values, dtype=torch.float32)
        self.values.grad = self._grad
        self._require_gradients(self.counts)

    def _require_gradients(self, counts: Sequence[int]) -> None:
        """Let those parameters alone require gradients of whose matrices some count is not zero, the same on all ranks."""
        needed = {id(matrix.param) for matrix, count in zip(self.matrices, counts, strict=True) if count}
        for part in self.parts:
            part.param.requires_grad_(id(part.param) in needed)
        reductions.renew(self._fsdp_modules)

    def _lay_out(self, indices: Sequence[Tensor]) -> None:
        """Make the segments of matrices and parameters from the local indices of each matrix."""
        self._segments, self.parts = lay_out(self.matrices, indices, self._reductions, self.is_on_host)
        for part in self.parts:
            if part.reduction is not None:
                part.reduction.choose(part.param, part.kept)
        quantised.make_exact([part.param for part in self.parts], [part.kept for part in self.parts], self.shard_group)
        if self._base is not None:
            self._base.add(self.parts)
        if not self.selector.is_known:
            sizes = torch.tensor([segment.kept.numel() for segment in self._segments])
            self.counts = all_reduce_sum(sizes.to(self.device), self.shard_group).tolist()

    def _read_shards(self) -> Tensor:
        """``[k_local]`` in :attr:`dtype`, the principal weights as the model holds them."""
        return self._flat(part.read(part.positions).to(self.dtype) for part in self.parts)

    def _flat(self, parts: Iterable[Tensor], padding: float = 0) -> Tensor:
        """The concatenation of vectors, padded as ``values`` is, and where that is."""
        where = torch.device("cpu") if self.is_on_host else self.device
        flat = torch.cat([part.to(where) for part in parts])
        return nn.functional.pad(flat, (0, -flat.numel() % self._multiple_of), value=padding)

    def _attached_grad(self) -> Tensor:
        self.check_not_at_base()
        if self.values.grad is None:  # cleared by optimizer.zero_grad(set_to_none=True)
            self._arrivals.drop()
            self._grad.zero_()
            self.values.grad = self._grad
        return self.values.grad

    @torch.no_grad()
    def _collect(self, number: int, param: Tensor) -> None:
        """Post-accumulate-grad hook of parameter ``number``: take the principal entries, drop the dense gradient."""
        if self.selector.is_gathering:
            return
        part, dense = self.parts[number], param.grad
        param.grad = None
        if dense is None:
            return
        source = local_tensor(dense)
        if part.reduction is not None:
            source = part.reduction.unrounded(source)
        entries, target = source.reshape(-1).index_select(0, part.positions), self._attached_grad()[part.span]
        if self.is_on_host:
            self._arrivals.add(target, entries)
        else:
            target += entries


def _check_free(params: Sequence[Tensor]) -> None:
    if any(param in _taken and _taken[param]() is not None for param in params):
        raise ValueError(
            "the model has principal weights already, which take its gradients: let them leave(), or delete them first"
        )


def _hook(principal: PrincipalWeights, number: int) -> Callable[[Tensor], None]:
    """Holds ``principal`` weakly: Python's garbage collector does not see a cycle through a parameter and its hook."""
    reference = weakref.ref(principal)

    def hook(param: Tensor) -> None:
        alive = reference()
        if alive is not None and not alive._has_left:
            alive._collect(number, param)

    return hook
