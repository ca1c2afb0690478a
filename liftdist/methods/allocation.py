"""AdaLoRA: which ranks of which adapters are kept (arXiv 2303.10512), by peft's allocator on sharded rows.

    s B diag(E) A          of each module, with E [r, 1], which starts at zero, A [r, n] and B [m, r], each sharded by rows
    R = mean over all A and B of |A A^T - I|_F and |B^T B - I|_F, each gathered in turn; weight x R is added to a step's loss
    I = |w g|              of each entry w with its gradient, which the rank that holds it averages over steps, and how far
                           I is from that average (eq. 9, 10); their product is the entry's score
    S_i = E_i + mean_j A_ij + mean_j B_ji of the scores, one all-reduce over the shards of all modules: [sum of r] float32

After the optimizer's step, the ranks with the lowest S of all modules lose their E, as many as the budget wants. Steps are
counted from 1, where peft leaves the count to the caller: after step ``total - tfinal`` the choice is final. As in peft,
gradients are those that the optimizer got, clipped, and weights those after its step.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liftdist.distributed.sharding import rows_of, whole_tensor
from liftdist.engine.dense import DenseWeights
from liftdist.errors import UserError
from liftdist.method_settings import LoraConfig
from liftdist.models import adapters

STATES = IMPORTANCE, UNCERTAINTY, KEPT = (
    "importance",
    "uncertainty",
    "kept",
)  # keys in a checkpoint; the last of E alone


class RankAllocation:
    """Drops ranks of the adapters in ``dense``, which are sharded alike."""

    def __init__(self, settings: LoraConfig, dense: DenseWeights) -> None:
        from peft.tuners.adalora import RankAllocator

        self._settings, self._dense = settings.adalora, dense
        self._params = dense.params
        self._values = dict(zip(dense.params, dense.values, strict=True))
        self._config = adapters.peft_config(settings, [])
        self._allocator = RankAllocator(_named(self._params.items()), self._config, adapters.ADAPTER)
        self._last = 0  # the step of the final choice
        self.kept: dict[str, Tensor] = {}  # of the final choice: [r_local] bool by the name of an E

    def schedule(self, total: int) -> None:
        """Set the number of steps of the run.

        Raises:
            UserError: it is too small for a step that drops ranks.
        """
        first, last = self._settings.tinit, total - self._settings.tfinal
        if first >= last:
            raise UserError(
                f"lora.adalora.tinit={first}: must be less than the run's {total} steps less tfinal={self._settings.tfinal}; "
                f"lower them, or raise train.steps"
            )
        self._config.total_step, self._last = total, last

    def regularise(self) -> None:
        """Add the gradient of the orthogonal regularisation. Collective."""
        factors = [name for name in self._params if ".lora_A." in name or ".lora_B." in name]
        for name in factors:
            param, value = self._params[name], self._values[name]
            whole = whole_tensor(param).float().requires_grad_()
            product = whole @ whole.T if ".lora_A." in name else whole.T @ whole
            distance = torch.linalg.norm(product - torch.eye(len(product), device=product.device))
            (gradient,) = torch.autograd.grad(distance, whole)
            assert value.grad is not None
            begin, end = rows_of(param)
            value.grad.add_(gradient[begin:end], alpha=self._settings.orth_reg_weight / len(factors))

    @torch.no_grad()
    def allocate(self, step: int) -> None:
        """Update the scores after the optimizer's step, and drop ranks if that is due. Collective."""
        if self.kept:
            self._drop(self.kept)
            return
        if step < self._last or not self._allocator.ipt:
            self._allocator.update_ipt(_named(self._values.items()))
        budget, is_due = self._allocator.budget_schedule(min(step, self._last))
        if is_due or step >= self._last:
            kept = self._chosen(budget)
            self._drop(kept)
            if step >= self._last:
                self.kept = kept
                self._allocator.reset_ipt()

    def state(self, name: str) -> dict[str, Tensor]:
        """What a checkpoint holds of a parameter, ``[k]`` each."""
        found = {IMPORTANCE: self._allocator.exp_avg_ipt, UNCERTAINTY: self._allocator.exp_avg_unc, KEPT: self.kept}
        return {key: held[name].flatten().to("cpu", copy=True) for key, held in found.items() if name in held}

    def load(self, name: str, saved: dict[str, Tensor], is_final: bool) -> None:
        """Take what :meth:`state` held of a parameter, cut to this rank's rows."""
        value = self._values[name]
        if is_final:
            if ".lora_E." in name:
                self.kept[name] = saved[KEPT].to(value.device)
        elif IMPORTANCE in saved:
            averages = (self._allocator.exp_avg_ipt, IMPORTANCE), (self._allocator.exp_avg_unc, UNCERTAINTY)
            for held, key in averages:
                held[name] = saved[key].view_as(value).to(value.device)
            self._allocator.ipt[name] = torch.zeros_like(value)  # which is computed again

    def _chosen(self, budget: int) -> dict[str, Tensor]:
        """The ranks to keep, ``[r_local]`` bool by the name of an E. Collective."""
        names = [name for name in self._params if ".lora_E." in name]
        scores = {name: torch.zeros(self._params[name].shape[0], device=self._values[name].device) for name in names}
        for name in names:
            for key in "EAB":
                of = name.replace(".lora_E.", f".lora_{key}.")
                entries = self._allocator._element_score(of).float()
                if key == "B":
                    scores[name] += entries.sum(0) / self._params[of].shape[0]
                else:
                    begin, end = rows_of(self._params[of])
                    scores[name][begin:end] += entries.mean(1)
        every = torch.cat(list(scores.values()))
        if self._dense.shard_group is not None:
            dist.all_reduce(every, group=self._dense.shard_group)
        for name, score in zip(names, every.split([len(scores[name]) for name in names]), strict=True):
            scores[name] = score
        threshold = torch.kthvalue(every, self._allocator.init_bgt - budget)[0]
        return {name: (score > threshold)[slice(*rows_of(self._params[name]))] for name, score in scores.items()}

    def _drop(self, kept: dict[str, Tensor]) -> None:
        for name, is_kept in kept.items():
            self._values[name].data.masked_fill_(~is_kept.unsqueeze(1), 0)


def _named(params: Iterable[tuple[str, Tensor]]) -> Any:
    """What peft's allocator takes for a model."""
    held = dict(params)
    return SimpleNamespace(named_parameters=held.items)
