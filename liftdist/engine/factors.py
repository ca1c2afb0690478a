"""Low-rank factors of one matrix on one device, by which its principal entries are selected. Independent of ranks.

    W_r  = sum over i <= r of s_i u_i v_i^T = (W V_r) V_r^T      best rank-r approximation of W [m, n]
    S    = the k entries of largest |W_r|                        ties to the lowest flat index

``method="exact"`` takes ``V_r`` from a full SVD, as the LIFT paper does (arXiv 2506.00772, section 3).
``method="fast"`` takes it from the smaller Gram matrix ``G = W^T W``, in one of two ways, chosen by size:

    Krylov   G projected on span{X, G X, ..., G^(d-1) X} with full reorthogonalisation; grown until accurate enough
    Gram     ``eigh`` of G itself, in float32, then in float64

Accuracy is estimated a posteriori. The angle between a Ritz vector v_i, of Ritz value theta_i and residual
rho_i = |G v_i - theta_i v_i|, and the dominant r-dimensional eigenspace has a sine of at most rho_i / (theta_i - theta_(r+1)), so

    |W_r - W V V^T|_F^2  <~  sum over i <= r of (theta_i + theta_(r+1)) (rho_i / (theta_i - theta_(r+1)))^2

and an entry is misclassified if its error exceeds its distance to the selection threshold. If the expected share of such
entries is above ``MISS_TOLERANCE``, the next more accurate factorisation is tried; the last one is the full SVD.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FACTORINGS = ("exact", "fast")

#: Largest estimated share of the selected entries that a fast factorisation may get wrong.
MISS_TOLERANCE = 2e-3

KRYLOV_BLOCK = 32  # columns of one Krylov block: thin blocks reach a higher degree at the same cost
KRYLOV_FIRST_CHECK = 5  # columns at the first check of the residuals, in multiples of the filter rank
KRYLOV_CHECK = 3  # blocks between two checks
KRYLOV_BREAKDOWN = 1e-5  # a new direction below this share of theta_1 is float32 rounding noise
KRYLOV_MAX_SHARE = 0.3  # a basis wider than this share of the smaller side costs more than ``eigh``
SAMPLED_ROWS = 16  # rows in which the density of |W_r| around the threshold is measured


class Factors(NamedTuple):
    """``left @ right.T`` approximates ``W_r``; ``error`` estimates the Frobenius norm of the difference."""

    left: Tensor  # [m, r] float32, W V_r
    right: Tensor  # [n, r] float32, orthonormal columns V_r
    error: float


def factor(matrix: Tensor, num_selected: int, filter_rank: int, method: str, seed: int) -> Factors:
    """The cheapest factors of ``matrix [m, n]`` that select ``num_selected`` entries accurately."""
    if method == "fast":
        for factors in fast_factors(matrix, filter_rank, seed):
            if estimated_miss(factors, num_selected) <= MISS_TOLERANCE:
                return factors
    return exact_factors(matrix, filter_rank)


def exact_factors(matrix: Tensor, filter_rank: int) -> Factors:
    """From a full SVD of ``matrix [m, n]``."""
    _, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    right = vh[:filter_rank].T
    return Factors(matrix @ right, right, _product_rounding(values[:filter_rank].square()))


def fast_factors(matrix: Tensor, filter_rank: int, seed: int) -> Iterator[Factors]:
    """Factorisations of ``matrix [m, n]``, each more accurate and more expensive than the one before."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    for factors in itertools.chain(
        krylov_factors(tall, filter_rank, seed),
        (gram_factors(tall, filter_rank, dtype) for dtype in (torch.float32, torch.float64)),
    ):
        # a wide matrix was factored as W^T ~ left right^T, so W ~ right left^T
        yield Factors(factors.right, factors.left, factors.error) if wide else factors


def gram_factors(tall: Tensor, filter_rank: int, dtype: torch.dtype) -> Factors:
    """From ``eigh`` of the Gram matrix ``[n, n]`` of ``tall [m, n]``, m >= n, computed in ``dtype``."""
    matrix = tall.to(dtype)
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    right = vectors[:, -filter_rank:].flip(1).float()
    return Factors(tall @ right, right, _error(values, torch.zeros_like(values[:filter_rank]), filter_rank))


def krylov_factors(tall: Tensor, filter_rank: int, seed: int) -> Iterator[Factors]:
    """From growing block Krylov spaces of the Gram matrix of ``tall [m, n]``; yields none where ``eigh`` is cheaper."""
    n = tall.shape[1]
    max_blocks = max_krylov_blocks(n, filter_rank)
    if not max_blocks:
        return
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same start for every device
    start = torch.randn(n, KRYLOV_BLOCK, generator=generator, dtype=torch.float32, device="cpu").to(tall.device)
    basis = tall.new_empty(n, max_blocks * KRYLOV_BLOCK)
    image = tall.new_empty(tall.shape[0], max_blocks * KRYLOV_BLOCK)  # tall @ basis
    block = torch.linalg.qr(start).Q
    for index in range(max_blocks):
        begin, end = index * KRYLOV_BLOCK, (index + 1) * KRYLOV_BLOCK
        basis[:, begin:end] = block
        image[:, begin:end] = tall @ block
        following = tall.T @ image[:, begin:end]
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            following -= basis[:, :end] @ (basis[:, :end].T @ following)
        block, coupling = torch.linalg.qr(following)
        largest = image[:, :end].square().sum(0).max()  # of the Rayleigh quotients, a lower bound of theta_1
        if coupling.diagonal().abs().min() < KRYLOV_BREAKDOWN * largest:
            return  # the space is exhausted: the next block would be rounding noise, not orthogonal to the others
        if end >= KRYLOV_FIRST_CHECK * filter_rank and index % KRYLOV_CHECK == 0:
            values, vectors = torch.linalg.eigh(image[:, :end].T @ image[:, :end])
            vectors = vectors[:, -filter_rank:].flip(1)
            # G Q = Q T + block coupling E^T, where E^T selects the rows of the newest block: residuals need no product with G
            residuals = torch.linalg.vector_norm(coupling @ vectors[begin:], dim=0)
            yield Factors(image[:, :end] @ vectors, basis[:, :end] @ vectors, _error(values, residuals, filter_rank))


def max_krylov_blocks(small: int, filter_rank: int) -> int:
    blocks = int(small * KRYLOV_MAX_SHARE) // KRYLOV_BLOCK
    return blocks if blocks * KRYLOV_BLOCK >= 8 * filter_rank else 0


def _error(values: Tensor, residuals: Tensor, filter_rank: int) -> float:
    """Estimated Frobenius error of ``W_r`` from all Ritz values (ascending) and the residuals of the r largest."""
    rounding_unit = torch.finfo(values.dtype).eps
    values = values.flip(0).double().clamp_min(0.0)
    kept, following = values[:filter_rank], values[filter_rank]
    residuals = residuals.double() + rounding_unit * values[0]
    sine = (residuals / (kept - following).clamp_min(1e-300)).clamp_max(1.0)
    return float(((kept + following) * sine**2).sum().sqrt()) + _product_rounding(kept)


def _product_rounding(squared_singular_values: Tensor) -> float:
    """Frobenius error of forming ``left @ right.T`` in float32."""
    return 2 * torch.finfo(torch.float32).eps * float(squared_singular_values.double().sum().sqrt())


def estimated_miss(factors: Factors, num_selected: int) -> float:
    """Upper estimate of the share of the selection that differs from the exact one.

    Every entry is assumed to have twice the mean error; the density of ``|W_r|`` around the threshold, sampled from some
    rows, then gives the expected number of misclassified entries. Three standard deviations of a Poisson count and one
    entry are added, because small counts vary.
    """
    left, right, error = factors
    size = left.shape[0] * right.shape[0]
    if num_selected in (0, size):
        return 0.0
    rows = left[:: max(1, left.shape[0] // SAMPLED_ROWS)]
    sample = (rows @ right.T).abs_().reshape(-1)
    kth = max(1, min(sample.numel(), round(num_selected / size * sample.numel())))
    threshold = float(sample.topk(kth, sorted=False).values.min())
    if threshold == 0.0:
        return 1.0
    window = 0.1 * threshold
    density = float(((sample - threshold).abs() < window).double().mean()) / (2 * window)  # share per unit of |W_r|
    expected = size * density * 2 * error / size**0.5
    return min(1.0, (expected + 3 * expected**0.5 + 1) / num_selected)
