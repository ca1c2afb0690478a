"""LIFT: the principal weights of each matrix, as one flat vector, and the optimizer that steps it (arXiv 2506.00772).

    attach -> for each step: before_step, forward and backward, reduce, clip, step or skip

A checkpoint stores its state as tensors of each matrix, ``NAME/KEY``, among them sorted ``indices`` and ``dropped_indices``.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liftdist.console import GIB
from liftdist.distributed import collectives
from liftdist.distributed.collectives import together
from liftdist.engine.adamw import reference_eps
from liftdist.engine.gathered import Backwards, Gathered
from liftdist.engine.matrices import Matrix, Place, principal_matrices
from liftdist.engine.principal import PrincipalWeights
from liftdist.engine.selection import Budget, Criterion, check, decides_number
from liftdist.engine.selector import is_of_selector
from liftdist.errors import UserError
from liftdist.method_settings import SelectionConfig
from liftdist.methods.base import SURVIVED
from liftdist.methods.named import Base, Excluded, Named
from liftdist.models import build
from liftdist.models.hub import resolve_model
from liftdist.models.names import NameMap
from liftdist.models.part import Part
from liftdist.registry import BUDGETS, CRITERIA, OPTIMIZERS
from liftdist.runs import selections
from liftdist.runs.context import RunContext
from liftdist.schema import Config


class Lift:
    """The principal weights of a model and their optimizer, with the settings of a run."""

    def __init__(self, config: Config, principal: PrincipalWeights, selection: Path | None = None) -> None:
        self._config = config
        self.selection = selection  # the cache folder of the first selection
        self.principal = principal
        stepping = OPTIMIZERS.load(config.optimizer.name)
        self.optimizer = stepping.make(principal, config.optimizer)
        self._states: set[str] = stepping.element_states(config.optimizer)

    @property
    def matrices(self) -> list[Matrix]:
        """The trained matrices, in the order of the state."""
        return self.principal.matrices

    def changes(self, names: NameMap) -> dict[str, tuple[str, Part | None]]:
        return {matrix.name: names.changed(matrix.name, matrix.place) for matrix in self.matrices}

    def before_step(self, step: int, steps: int) -> dict[str, float]:
        """Refresh the selection if it is due before the forward of ``step``, counted from 1; metrics by tag. Collective."""
        interval = self._config.selection.refresh_interval
        if not interval or step % interval or getattr(self.principal.selector.criterion, "stays", False):
            return {}
        return {SURVIVED: self.principal.refresh(self.optimizer, number=step // interval)}

    def reselect(self, step: int) -> None:
        """Select again after loading a state of ``step`` that was made with other selection settings. Collective.

        Raises:
            UserError: a weight has been trained that is excluded now.
        """
        self.principal.check_excluded()
        interval = self._config.selection.refresh_interval
        self.principal.refresh(self.optimizer, number=step // interval if interval else None)

    def reduce(self, divisor: Tensor) -> None:
        """Sum the gradient over the replicas and divide it by the divisor of the global batch's loss. Collective."""
        self.principal.reduce_gradients(divisor)

    def clip(self) -> Tensor:
        """Clip the gradient to ``optimizer.max_grad_norm``; return its norm before clipping. Collective."""
        return self.principal.clip_grad_norm_(self._config.optimizer.max_grad_norm)

    def step(self) -> None:
        """Update the weights. Epsilon depends on the optimizer's own count of updates, which may begin later than the run's."""
        if self._config.optimizer.reference_numerics:
            own = 1 + int(self.scalars().get("step", 0))
            self.optimizer.param_groups[0]["eps"] = reference_eps(self._config.optimizer, own)
        self.optimizer.step()

    def skip(self) -> None:
        """Clear the gradient, as if there had been no backward."""
        self.principal.drop_gradients()

    def non_finite(self) -> list[str]:
        """Names of the matrices whose gradient on this rank is not finite."""
        return self.principal.non_finite()

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank holds beyond the base model, copied to the host: see :meth:`PrincipalWeights.state_dict`."""
        return self.principal.state_dict(self.optimizer)

    def weights(self) -> dict[str, Tensor]:
        """:meth:`state_dict` without the optimizer's state."""
        return self.principal.state_dict()

    def scalars(self) -> dict[str, float]:
        """The scalar states of the optimizer, equal on all ranks."""
        return self.principal.scalar_states(self.optimizer)

    def load_state_dict(self, tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
        """Load :meth:`state_dict`, cut to this rank's rows, and :meth:`scalars` into a model that holds the base weights.

        The state of another optimizer is left out: this one starts anew.
        """
        saved = {key.partition("/optimizer.")[2] for key in tensors if "/optimizer." in key}
        if saved and saved != self._states:
            tensors = {key: tensor for key, tensor in tensors.items() if "/optimizer." not in key}
            scalars = {key: value for key, value in scalars.items() if is_of_selector(key)}
        self.principal.load_state_dict(tensors, self.optimizer, scalars)

    def at_base(self) -> AbstractContextManager[None]:
        """A context in which the model is the base model, see :meth:`PrincipalWeights.at_base`; if ``config.keeps_base``."""
        return self.principal.at_base()

    def leave(self) -> None:
        """See :meth:`PrincipalWeights.leave`; if ``context.shares_model``."""
        self.principal.leave()

    def enter(self) -> None:
        """See :meth:`PrincipalWeights.enter`."""
        self.principal.enter()

    def describe(self, model: nn.Module) -> str:
        """A summary of the trained weights in plain text. Collective."""
        everything = sum(param.numel() for param in model.parameters())
        fullest = max(collectives.gather(self.principal.values.numel()))
        each = 8 + (1 + len(self._states)) * self.principal.values.element_size()
        lines = [
            f"weights of the model      {everything}",
            f"principal weights         {self.principal.num_selected} ({self.principal.num_selected / everything:.2%})",
            f"on the fullest rank       {fullest} ({fullest * each / GIB:.3f} GiB of values, gradient, states and indices"
            f"{', on the host' if self.principal.is_on_host else ''})",
        ]
        for matrix, count in zip(self.matrices, self.principal.counts, strict=True):
            lines.append(f"{matrix.name}  {list(matrix.shape)}  {count}")
        return "\n".join(lines)


def extend(config: Config, model: PreTrainedModel) -> None:
    """Nothing is added."""


def prepare(config: Config, model: PreTrainedModel, names: NameMap) -> NameMap:
    """Freeze the parameters that hold no matrix to train.

    Raises:
        UserError: no module fits ``selection.modules``, or gradients cannot be gathered without dropout.
    """
    choice = config.selection
    if choice.needs_data and (by := config.model.keeps_less_by) and build.dropout(model.config):
        raise UserError(
            f"selection.{choice.needs_data} gathers gradients without dropout, which layers that are recomputed or offloaded "
            f"would have; set {'=false and '.join(by)}=false, or the rates in config.json to 0"
        )
    trained = {place.param for place in places(config, model).values()}
    for param in model.parameters():
        param.requires_grad_(param in trained)
    return names


def places(config: Config, model: PreTrainedModel) -> dict[str, Place]:
    """The matrices to train, by name. Raises ``UserError`` like :func:`prepare`, and for what the criterion cannot select in."""
    found = principal_matrices(model, config.selection.modules)
    check(criterion_of(config.selection), found)
    return found


def attach(
    context: RunContext,
    model: nn.Module,
    names: NameMap,
    base_digest: str,
    from_checkpoint: bool = False,
    backwards: Backwards | None = None,
) -> Lift:
    """Select the principal weights of ``model``, or read a cached selection. Collective.

    Args:
        base_digest: digest of the model's weights.
        from_checkpoint: select nothing, because a checkpoint will be loaded.
        backwards: for criteria by gradients.
    """
    config, console, choice = context.config, context.console, context.config.selection
    named, excluded = _files(context, base_digest)
    cached = _CachedSelection(context, base_digest, excluded)
    criterion, budget = rules(choice, named)
    if not from_checkpoint:
        console.say(f"selecting principal weights: {criterion}")
    started = time.perf_counter()

    def initial(principal: PrincipalWeights) -> list[Tensor] | None:
        with together():
            if named is not None:
                named.check(principal.matrices)
        return cached.read(principal)

    with console.progress("selecting", "matrices") as progress:
        principal = PrincipalWeights(
            model,
            criterion=criterion,
            budget=budget,
            excluded=excluded,
            modules=choice.modules,
            replicate_group=context.mesh.replicate_group,
            dtype=getattr(torch, config.optimizer.dtype),
            device=config.optimizer.device,
            initial_indices=_no_indices if from_checkpoint else initial,
            sparse_reduce_scatter=config.mesh.sparse_reduce_scatter,
            keep_base=config.keeps_base or context.shares_model,
            progress=context.cancellation.at_boundaries(progress),
            on_selected=cached.add,
            backwards=backwards,
        )
    cached.write()
    total = sum(matrix.numel for matrix in principal.matrices)
    everything = sum(param.numel() for param in model.parameters())
    console.say(
        f"{principal.num_selected} principal weights in {len(principal.matrices)} matrices: "
        f"{principal.num_selected / total:.2%} of them, {principal.num_selected / everything:.2%} of the model's {everything} "
        f"weights ({time.perf_counter() - started:.1f} s)"
    )
    if excluded is not None:
        console.say(
            f"left out: {sum(principal.selector.num_excluded)} weights of {len(choice.exclude)} deltas (selection.exclude)"
        )
    if principal.is_on_host and principal.device.type == "cpu":
        console.say("optimizer.device=cpu saves nothing here: the model is on the CPU as well")
    kinds = Counter(map(_kind, principal.matrices))
    console.say("trained: " + ", ".join(f"{number} {kind}" for kind, number in kinds.items()))
    return Lift(config, principal, cached.folder)


def rules(choice: SelectionConfig, named: Named | None = None) -> tuple[Criterion, Budget]:
    """The criterion and the budget of a config; a criterion that decides the number of weights is its own budget.

    Args:
        named: what ``selection.file`` names; needed to select.
    """
    criterion: Any = criterion_of(choice, named)
    return criterion, criterion if decides_number(criterion) else BUDGETS.load(choice.budget).make(choice)


def criterion_of(choice: SelectionConfig, named: Named | None = None) -> Criterion:
    """The criterion of a config, see :func:`rules`."""
    settings = choice if named is None else SimpleNamespace(**vars(choice) | {"file": named})
    return CRITERIA.load(choice.criterion).make(settings)


def _files(context: RunContext, base_digest: str) -> tuple[Named | None, Excluded | None]:
    """The weights that ``selection.file`` and ``selection.exclude`` name. Collective."""
    config, choice = context.config, context.config.selection
    if choice.file is None and not choice.exclude:
        return None, None
    cache_dir = Path(config.cache_dir).expanduser()
    with together():
        folder = resolve_model(config.model.path, config.model.revision)
        base = Base(folder, base_digest, config.model.trust_remote_code)
        excluded = Excluded(config, base) if choice.exclude else None
        named = None if choice.file is None else Named(Path(choice.file).expanduser(), base, cache_dir)
    return named, excluded


def _kind(matrix: Matrix) -> str:
    """What a matrix is called in its layer."""
    of = "" if matrix.place.is_whole else "experts' "
    return of + matrix.name.removesuffix(".weight").rpartition(".")[2]


def _no_indices(principal: PrincipalWeights) -> list[Tensor]:
    """Empty indices for every matrix."""
    return [torch.empty(0, dtype=torch.int32, device=matrix.device) for matrix in principal.matrices]


class _CachedSelection:
    """The first selection of a run in the cache: read if it is there, otherwise collected while it is made, and written."""

    def __init__(self, context: RunContext, base_digest: str, excluded: Excluded | None) -> None:
        self._context, self._base = context, context.config.model.identity(base_digest)
        self._excluded = None if excluded is None else excluded.digest
        self._selected: dict[str, Tensor] = {}  # whole selections of the matrices that this rank owned
        self.folder: Path | None = None

    def read(self, principal: PrincipalWeights) -> list[Tensor] | None:
        """For each matrix ``[k_local]`` int32; None, on all ranks, if there is no valid cached selection. Collective.

        A selection by gradients is not cached: it depends on the data as well.
        """
        if isinstance(principal.selector.criterion, Gathered):
            return None
        key = selections.key(
            self._base,
            principal.selector.criterion,
            principal.selector.budget,
            principal.matrices,
            principal.selector.allotted,
            self._excluded,
        )
        self.folder = Path(self._context.config.cache_dir).expanduser() / "selections" / key
        indices = None
        try:
            known = principal.selector.allotted if principal.selector.is_known else None
            indices = selections.read(self.folder, principal.matrices, known)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self._context.console.say(f"cached selection {self.folder} ignored: {error}")
        return None if collectives.agree(indices is None) else indices

    def add(self, name: str, indices: Tensor) -> None:
        self._selected[name] = indices.cpu()

    def write(self) -> None:
        """Write the selection if one was made. Collective."""
        if self.folder is None or not collectives.agree(bool(self._selected)):
            return
        if not selections.write(self.folder, self._selected):
            cache_dir = self._context.config.cache_dir
            self._context.console.say(f"selection not cached: cache_dir {cache_dir} is not shared by all ranks")
