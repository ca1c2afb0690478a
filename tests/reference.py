"""LIFT as its authors describe it (arXiv 2506.00772), dense, on one process: the oracle for everything that is distributed.

One full SVD a matrix, a boolean mask, the whole gradient, Adam written out, float32 throughout. Slow and obvious.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def principal_mask(weight: Tensor, num_selected: int, filter_rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    low_rank = (u[:, :filter_rank] * s[:filter_rank]) @ vh[:filter_rank]
    order = low_rank.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[:num_selected]] = True
    return mask.view_as(weight)


class DenseLift:
    def __init__(self, model, names, num_selected, filter_rank, interval, lrs, betas, eps):
        self.model, self.num_selected, self.filter_rank, self.interval = model, num_selected, filter_rank, interval
        self.lrs, self.betas, self.eps = lrs, betas, eps
        self.weights = {name: model.get_parameter(name) for name in names}
        self.step = 0
        self.masks = self.select()
        self.first = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def select(self):
        return {
            name: principal_mask(weight.detach(), self.num_selected[name], self.filter_rank)
            for name, weight in self.weights.items()
        }

    def refresh(self):
        old, self.masks = self.masks, self.select()
        for name in self.weights:
            stayed = old[name] & self.masks[name]
            self.first[name] *= stayed
            self.second[name] *= stayed

    def run_step(self, samples):
        """``samples``: lists of (token ids, labels), one at a time. Returns the mean loss over all labelled tokens."""
        self.step += 1
        if self.interval and self.step % self.interval == 0:
            self.refresh()
        self.model.zero_grad()
        tokens = sum(sum(label != -100 for label in labels[1:]) for _, labels in samples)
        total = 0.0
        for ids, labels in samples:
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
            loss = F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum", ignore_index=-100) / tokens
            loss.backward()
            total += loss.item()
        lr, (beta1, beta2) = self.lrs[self.step - 1], self.betas
        for name, weight in self.weights.items():
            grad = weight.grad * self.masks[name]
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * grad
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * grad**2
            corrected1 = self.first[name] / (1 - beta1**self.step)
            corrected2 = self.second[name] / (1 - beta2**self.step)
            with torch.no_grad():
                weight -= lr * self.masks[name] * corrected1 / (corrected2.sqrt() + self.eps)
        return total


class DenseFull:
    """Full fine-tuning on one process: the gradient of all samples, and AdamW of torch on copies of the weights in ``dtype``."""

    def __init__(self, model, names, lrs, betas, eps, weight_decay=0.0, max_norm=None, dtype=torch.float32):
        self.model, self.lrs, self.max_norm = model, lrs, max_norm
        self.weights = {name: model.get_parameter(name) for name in names}
        self.masters = {name: weight.detach().to(dtype, copy=True) for name, weight in self.weights.items()}
        decayed = [master for master in self.masters.values() if master.ndim > 1]
        vectors = [master for master in self.masters.values() if master.ndim == 1]
        groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps)
        self.step = 0

    def regularise(self):
        """What is added to the gradients of the masters, before they are clipped: nothing."""

    def stepped(self):
        """What follows a step, while there are gradients: nothing."""

    def run_step(self, samples):
        """Like :meth:`DenseLift.run_step`."""
        self.step += 1
        tokens = sum(sum(label != -100 for label in labels[1:]) for _, labels in samples)
        total = 0.0
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        for ids, labels in samples:
            self.model.zero_grad()
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
            loss = F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum", ignore_index=-100)
            loss.backward()
            total += loss.item()
            for name, master in self.masters.items():
                master.grad += self.weights[name].grad.to(master.dtype)
        for master in self.masters.values():
            master.grad /= tokens
        self.regularise()
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lrs[self.step - 1]
        self.optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                self.weights[name].copy_(master)
        self.stepped()
        return total / tokens


def linear_of(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings()
    return [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
