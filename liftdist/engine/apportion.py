"""Whole numbers in given proportions, with a given sum."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def apportion(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Numbers proportional to ``weights``, none above its cap, that sum to ``total``.

    What a cap cuts off goes to the others, in their proportions. Fractions are rounded by largest remainder, ties to the first.

    Raises:
        ValueError: the caps of those with a weight above zero sum to less than ``total``.
    """
    exact = [Fraction(weight) for weight in weights]
    room = sum(cap for cap, weight in zip(caps, exact, strict=True) if weight)
    if total > room:
        raise ValueError(f"asked for {total} weights, but only {room} may be taken")
    result = [0] * len(exact)
    free = [number for number, weight in enumerate(exact) if weight and caps[number]]
    while free:
        factor = (total - sum(result)) / sum(exact[number] for number in free)
        full = [number for number in free if exact[number] * factor >= caps[number]]
        if not full:
            quotas = {number: exact[number] * factor for number in free}
            result = [int(quotas[number]) if number in quotas else taken for number, taken in enumerate(result)]
            left = total - sum(result)
            for number in sorted(free, key=lambda number: (int(quotas[number]) - quotas[number], number))[:left]:
                result[number] += 1
            break
        for number in full:
            result[number] = caps[number]
        free = [number for number in free if number not in set(full)]
    return result
