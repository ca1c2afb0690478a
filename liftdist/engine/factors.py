"""One matrix on one device: which of its entries are principal. Knows nothing of ranks.

    W_r  = sum over i <= r of s_i u_i v_i^T = (W V_r) V_r^T      best rank-r approximation of W [m, n]
    S    = the k entries of largest |W_r|                        ties to the lowest flat index

``method="exact"`` takes ``V_r`` from a full SVD, as the LIFT paper does (arXiv 2506.00772, section 3).
``method="fast"`` takes it from the smaller Gram matrix ``G = W^T W``, in one of two ways, chosen by size:

    Krylov   G projected on span{X, G X, ..., G^(d-1) X} with full reorthogonalisation; grown until it is good enough
    Gram     ``eigh`` of G itself, in float32, then in float64

Good enough is decided by what the factorisation knows about itself. A Ritz pair (theta_i, v_i) with residual
rho_i = |G v_i - theta_i v_i| leans out of the wanted subspace by at most rho_i / (theta_i - theta_(r+1)), so

    |W_r - W V V^T|_F^2  <~  sum over i <= r of (theta_i + theta_(r+1)) (rho_i / (theta_i - theta_(r+1)))^2

and an entry changes sides when that error exceeds its distance to the threshold. Where the expected share of such
entries is above ``MISS_TOLERANCE``, the next better factorisation is tried; the last one is the full SVD.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("exact", "fast")

#: Largest estimated share of the selected entries that a fast factorisation may get wrong.
MISS_TOLERANCE = 2e-3

KRYLOV_BLOCK = 32  # columns of one Krylov block: thin blocks reach a higher degree for the same products
KRYLOV_FIRST_CHECK = 5  # the first look at the residuals, in multiples of the filter rank
KRYLOV_CHECK = 3  # blocks between two looks
KRYLOV_BREAKDOWN = 1e-5  # a new direction this much smaller than theta_1 is lost in float32 rounding
KRYLOV_MAX_SHARE = 0.3  # a basis wider than this share of the smaller side costs more than ``eigh``
SAMPLED_ROWS = 16  # rows in which the density of |W_r| around the threshold is measured
CANDIDATE_ROWS = 32  # rows of which the threshold of a selection is guessed
CANDIDATE_MARGIN = 1.3  # how many times more entries than wanted shall lie above the guess
BLOCK = 2**24  # entries of a block of rows
FACTORING_THREADS = 1  # fixed: another number of threads rounds differently and moves a few entries


class Factors(NamedTuple):
    """``left @ right.T`` approximates ``W_r``; ``error`` estimates the Frobenius norm of the difference."""

    left: Tensor  # [m, r] float32, W V_r
    right: Tensor  # [n, r] float32, orthonormal columns V_r
    error: float


def select(weight: Tensor, num_selected: int, filter_rank: int, method: str = "fast", seed: int = 0) -> Tensor:
    """Flat indices of the ``num_selected`` entries of largest ``|W_r|``.

    Args:
        weight: ``[m, n]``, any floating dtype, on any device.
        num_selected: how many entries, 0 to ``m * n``.
        filter_rank: ``r``; at ``r >= min(m, n)`` the matrix itself is scored.
        method: ``"exact"`` or ``"fast"``.
        seed: seeds the random start of the Krylov space.

    Returns:
        ``[num_selected]`` int64, sorted ascending, on the device of ``weight``. Equal weights on equal hardware give
        equal indices, bit for bit.

    Raises:
        ValueError: the weight holds NaN or infinity, or an argument is out of range.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    if not 0 <= num_selected <= weight.numel():
        raise ValueError(
            f"num_selected must be 0 to {weight.numel()} for shape {tuple(weight.shape)}, got {num_selected}"
        )
    if filter_rank < 1:
        raise ValueError(f"filter_rank must be at least 1, got {filter_rank}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    with torch.no_grad(), _reproducible(weight.device):
        scores_of = _scorer(weight.float(), num_selected, filter_rank, method, seed)
        return top_k(scores_of, weight.shape, num_selected)


def _scorer(matrix: Tensor, num_selected: int, filter_rank: int, method: str, seed: int) -> Callable[[slice], Tensor]:
    """``|W_r|`` of a slice of rows. Of ``matrix`` itself nothing is kept but where it is scored."""
    if not torch.isfinite(matrix.sum()):
        raise ValueError("weight holds NaN or infinity")
    if filter_rank >= min(matrix.shape):
        return lambda rows: matrix[rows].abs()
    left, right, _ = _factor(matrix, num_selected, filter_rank, method, seed)
    return lambda rows: (left[rows] @ right.T).abs_()


def top_k(scores_of: Callable[[slice], Tensor], shape: Sequence[int], k: int) -> Tensor:
    """Sorted flat indices (int64) of the ``k`` largest scores of an ``[m, n]`` matrix, ties to the lowest index.

    A sample of rows says about where the threshold is. One pass, a block of rows at a time, keeps what lies above: little more
    than ``k`` entries, of which the k-th is found. Of all scores only a block exists at a time.

    Args:
        scores_of: the scores of a slice of rows, ``[rows, n]`` float32, none negative.
    """
    m, n = shape
    sample = scores_of(slice(None, None, max(1, m // CANDIDATE_ROWS))).reshape(-1)
    if sample.dtype != torch.float32:
        raise ValueError(f"scores must be float32, got {sample.dtype}")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=sample.device)
    share = CANDIDATE_MARGIN * k / (m * n)
    while True:
        place = sample.numel() - int(share * sample.numel())
        bound = sample.kthvalue(place).values if place >= 1 else sample.new_zeros(())
        found = [_at_least(scores_of(slice(b, b + block)), bound, b * n) for b, block in _blocks(m, n)]
        indices, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        if indices.numel() >= k:
            break
        if place < 1:
            raise ValueError("scores are not finite")
        share *= 2  # the sample was not like the rest
    kth = scores.kthvalue(scores.numel() - k + 1).values
    selected = scores > kth
    ties = (scores == kth).nonzero().squeeze(1)
    selected[ties[: k - int(selected.sum())]] = True
    return indices[selected]


def _blocks(m: int, n: int) -> list[tuple[int, int]]:
    """``(first row, rows)`` of the blocks of a matrix: of its shape alone, as products round by theirs."""
    rows = max(1, BLOCK // n)
    return [(begin, min(rows, m - begin)) for begin in range(0, m, rows)]


def _at_least(scores: Tensor, bound: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Flat indices, plus ``offset``, and scores of the entries of a block that reach ``bound``."""
    flat = scores.reshape(-1)
    indices = (flat >= bound).nonzero().squeeze(1)
    return indices + offset, flat[indices]


def cost(m: int, n: int, filter_rank: int, method: str) -> float:
    """Relative time to factor an ``[m, n]`` matrix, for dealing matrices to ranks. Unit: about one flop."""
    small, large = min(m, n), max(m, n)
    if method == "exact":
        return 6.0 * large * small**2 + 20.0 * small**3
    if _max_krylov_blocks(small, filter_rank):
        basis = 7 * filter_rank
        return 4.0 * m * n * (basis + filter_rank) + 4.0 * small * basis**2
    return 2.0 * large * small**2 + 10.0 * small**3


def workspace(m: int, n: int, num_selected: int, filter_rank: int, method: str) -> int:
    """Bytes that :func:`select` needs besides an ``[m, n]`` weight, without what LAPACK and cuSOLVER take for themselves."""
    small, size = min(m, n), m * n
    if method == "exact":
        factoring = 4 * (2 * size + small * (m + n + small))  # copied to be overwritten; U, V
    else:
        krylov = 4 * _max_krylov_blocks(small, filter_rank) * KRYLOV_BLOCK * (m + n + 2 * small)
        factoring = 4 * size + max(krylov, 8 * (size + 3 * small * small))  # float64, if nothing less does
    choosing = 9 * min(size, BLOCK * 2) + round(24 * CANDIDATE_MARGIN * num_selected)
    return max(factoring, choosing)


def _factor(matrix: Tensor, num_selected: int, filter_rank: int, method: str, seed: int) -> Factors:
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
    """Factorisations of ``matrix [m, n]``, each better and dearer than the one before."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    for factors in itertools.chain(
        krylov_factors(tall, filter_rank, seed),
        (gram_factors(tall, filter_rank, dtype) for dtype in (torch.float32, torch.float64)),
    ):
        # of a wide matrix W^T ~ left right^T was factored, so W ~ right left^T
        yield Factors(factors.right, factors.left, factors.error) if wide else factors


def gram_factors(tall: Tensor, filter_rank: int, dtype: torch.dtype) -> Factors:
    """From ``eigh`` of the Gram matrix ``[n, n]`` of ``tall [m, n]``, m >= n, computed in ``dtype``."""
    matrix = tall.to(dtype)
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    right = vectors[:, -filter_rank:].flip(1).float()
    return Factors(tall @ right, right, _error(values, torch.zeros_like(values[:filter_rank]), filter_rank))


def krylov_factors(tall: Tensor, filter_rank: int, seed: int) -> Iterator[Factors]:
    """From ever larger block Krylov spaces of the Gram matrix of ``tall [m, n]``; none where ``eigh`` is cheaper."""
    n = tall.shape[1]
    max_blocks = _max_krylov_blocks(n, filter_rank)
    if not max_blocks:
        return
    generator = torch.Generator().manual_seed(seed)  # on the host: the same start on every device
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
            return  # the space is exhausted: the next block would be rounding errors, not orthogonal to the others
        if end >= KRYLOV_FIRST_CHECK * filter_rank and index % KRYLOV_CHECK == 0:
            values, vectors = torch.linalg.eigh(image[:, :end].T @ image[:, :end])
            vectors = vectors[:, -filter_rank:].flip(1)
            # G Q = Q T + block coupling E^T, where E^T picks the rows of the newest block: residuals cost nothing
            residuals = torch.linalg.vector_norm(coupling @ vectors[begin:], dim=0)
            yield Factors(image[:, :end] @ vectors, basis[:, :end] @ vectors, _error(values, residuals, filter_rank))


def _max_krylov_blocks(small: int, filter_rank: int) -> int:
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
    """Share of the selection that may differ from the exact one, on the high side.

    The error is spread over all entries, twice its mean in size; the density of ``|W_r|`` around the threshold,
    sampled from some rows, says how many entries change sides. Single entries follow chance: three standard deviations
    of a Poisson count, and one entry, are added.
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


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """One thread, no autocast and full float32 products, whatever the caller has set; restored afterwards."""
    threads = torch.get_num_threads()
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions = [backend.fp32_precision for backend in backends]
    torch.set_num_threads(FACTORING_THREADS)
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
