"""Criteria that give each entry of a matrix a score and take the largest.

S = the k entries of largest score, ties to the lowest flat index

Entries that are excluded have the score -1, which is never taken.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from liftdist.engine.topk import BLOCK, CANDIDATE_MARGIN, blocks, top_k

THREADS = 1  # fixed: another number of threads rounds differently and changes a few entries

#: Scores of a slice of rows: [rows, n] float32, none negative but those of entries that are excluded.
Scores = Callable[[slice], Tensor]

LARGEST = torch.finfo(torch.float32).max


class Scored(ABC):
    """A :class:`liftdist.engine.selection.Criterion` by scores."""

    #: Whether scores are absolute values in the unit of the weights, so that those of two matrices can be compared.
    are_magnitudes: ClassVar[bool] = False

    @abstractmethod
    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        """The scores of ``weight [m, n]`` float32, which may be overwritten or freed if it is not needed for them.

        Args:
            num_selected: how many are wanted, for scores whose accuracy depends on that.
            seed: of the matrix.
        """

    def __call__(self, weight: Tensor, num_selected: int, seed: int, excluded: Tensor | None = None) -> Tensor:
        """Flat indices of the ``num_selected`` entries of largest score.

        Args:
            weight: ``[m, n]``, any floating dtype, on any device.
            num_selected: how many entries, 0 to ``m * n`` less those that are excluded.
            excluded: ``[e]`` int64 flat indices of entries that must not be selected.

        Returns:
            ``[num_selected]`` int64, sorted ascending, on the device of ``weight``. Equal weights on equal hardware give
            equal indices, bit for bit.

        Raises:
            ValueError: the weight holds NaN or infinity, or an argument is out of range.
        """
        if weight.ndim != 2:
            raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
        available = weight.numel() - (0 if excluded is None else excluded.numel())
        if not 0 <= num_selected <= available:
            raise ValueError(
                f"num_selected must be 0 to {available} for shape {tuple(weight.shape)}, got {num_selected}"
            )
        if num_selected in (0, weight.numel()):
            return torch.arange(num_selected, device=weight.device)
        with self.scored(weight, num_selected, seed, excluded) as scores_of:
            return top_k(scores_of, weight.shape, num_selected)

    @contextlib.contextmanager
    def scored(self, weight: Tensor, num_selected: int, seed: int, excluded: Tensor | None = None) -> Iterator[Scores]:
        """:meth:`scores` of a weight of any dtype, to be taken within the context. Raises ``ValueError`` if it is not finite."""
        with torch.no_grad(), reproducible(weight.device):
            matrix = weight.float()
            if not torch.isfinite(matrix.sum()):
                raise ValueError("weight holds NaN or infinity")
            scores_of = self.scores(matrix, num_selected, seed)
            if excluded is None:
                yield scores_of
                return
            mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
            mask.view(-1)[excluded.to(weight.device)] = True
            yield lambda rows: scores_of(rows).masked_fill(mask[rows], -1.0)

    def workspace(self, m: int, n: int, num_selected: int) -> int:
        """Bytes needed besides an ``[m, n]`` weight."""
        return 8 * m * n + choosing(m, n, num_selected)


def choosing(m: int, n: int, num_selected: int) -> int:
    """Bytes that :func:`top_k` needs."""
    return 9 * min(m * n, BLOCK * 2) + round(24 * CANDIDATE_MARGIN * num_selected)


BUCKETS = 2**15  # of a histogram: by the exponent and the seven highest bits of the mantissa, as bfloat16 has them


def histogram(scores_of: Scores, shape: Sequence[int]) -> Tensor:
    """``[buckets, 2]`` int64 on the host: the buckets that hold scores of an ``[m, n]`` matrix, ascending; how many each holds.

    Scores are divided by their root mean square. A bucket holds those whose float32 bits without the lowest 16 are its number.
    Negative ones, of entries that are excluded, count nowhere.
    """

    def parts() -> Iterator[Tensor]:
        for begin, rows in blocks(*shape):
            scores = scores_of(slice(begin, begin + rows)).reshape(-1)
            yield scores[scores >= 0]

    squared, number = 0.0, 0
    for scores in parts():
        squared, number = squared + float(scores.double().square().sum()), number + scores.numel()
    scale = (squared / max(number, 1)) ** 0.5 or 1.0
    numbers = torch.zeros(BUCKETS, dtype=torch.int64)
    for scores in parts():
        numbers += torch.bincount((scores / scale).view(torch.int32) >> 16, minlength=BUCKETS).cpu()
    buckets = numbers.nonzero().squeeze(1)
    return torch.stack([buckets, numbers[buckets]], 1)


def inverted(magnitudes: Tensor) -> Tensor:
    """Scores in the exact opposite order: the smallest of ``magnitudes``, float32 and none negative, becomes the largest."""
    bits = magnitudes.contiguous().abs().view(torch.int32)
    return (torch.tensor(LARGEST).view(torch.int32).to(bits.device) - bits).view(torch.float32)


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """One thread, no autocast and full float32 products, whatever the caller has set, which is restored."""
    threads = torch.get_num_threads()
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions = [backend.fp32_precision for backend in backends]
    torch.set_num_threads(THREADS)
    for backend in backends:
        backend.fp32_precision = "ieee"
    older = torch.get_float32_matmul_precision()  # raises before, where only the newer setting is another
    torch.set_float32_matmul_precision("highest")  # or it contradicts the newer, and reading allow_tf32 raises
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
