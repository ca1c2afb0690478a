"""The samples of several sources as one set: numbered one source after the other, and how many an epoch takes of each.

records of a source -> held out, or to train on -> how many of them an epoch takes -> Mixture
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from liftdist import digests
from liftdist.data.order import Share
from liftdist.data.table import Table
from liftdist.data.tokenised import Report, Samples
from liftdist.data_settings import DataSource
from liftdist.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """Samples of one or several sources, memory-mapped. Sample ``i`` is of the source in whose part of the numbers it is."""

    names: tuple[str, ...]
    parts: tuple[Samples, ...]
    shares: tuple[Share, ...]
    table: Table  # columns: input_ids, labels, weights
    lengths: np.ndarray  # [samples] int64, tokens of each
    first: np.ndarray  # [sources] int64, number of the first sample of each
    digest: str  # of the samples and of how many an epoch takes: equal digests mean equal training data

    @classmethod
    def of(cls, names: Sequence[str], parts: Sequence[Samples], taken: Sequence[int] | None = None) -> Mixture:
        """The mixture of some sources.

        Args:
            taken: samples that an epoch takes of each; all of them if None.
        """
        sizes = [len(part) for part in parts]
        shares = tuple(Share(size, count) for size, count in zip(sizes, taken or sizes, strict=True))
        digest = digests.of_parts([[part.digest, *share] for part, share in zip(parts, shares, strict=True)])
        table = Table.concat([part.table for part in parts])
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(tuple(names), tuple(parts), shares, table, lengths, np.cumsum([0, *sizes[:-1]]), digest)

    def __len__(self) -> int:
        return len(self.lengths)

    def source_of(self, sample: int) -> int:
        """The number of the source that a sample is of."""
        return int(np.searchsorted(self.first, sample, side="right")) - 1

    def where(self, sample: int) -> str:
        """Location of a sample's record: file and line, or name and number of the record."""
        source = self.source_of(sample)
        return self.parts[source].where(sample - int(self.first[source]))

    @property
    def report(self) -> Report:
        """What became of the records of all sources."""
        report = Report()
        for part in self.parts:
            report.merge(part.report.counts, part.report.places, part.report.names)
        return report

    def lines(self) -> list[str]:
        """One line a source: samples it has, how many an epoch takes, how many passes that is; none if each comes once."""
        if len(self.parts) == 1 and self.shares[0].size == self.shares[0].taken:
            return []
        return [
            f"source {name}: {size} samples, an epoch takes {taken} ({taken / size:.3g} pass{'' if taken == size else 'es'})"
            for name, (size, taken) in zip(self.names, self.shares, strict=True)
        ]


def taken(sources: Sequence[DataSource], sizes: Sequence[int]) -> list[int]:
    """Samples that an epoch takes of each source.

    With weights, an epoch has as many samples as all sources together, in the proportion of the weights; what rounding down
    leaves goes to the largest remainders. Else a source gives ``samples``, or each of its own once.

    Args:
        sizes: samples of each source.

    Raises:
        UserError: none of a source.
    """
    if all(source.weight is None for source in sources):
        return [source.samples or size for source, size in zip(sources, sizes, strict=True)]
    weights = [Fraction(source.weight or 0) for source in sources]
    exact = [sum(sizes) * weight / sum(weights) for weight in weights]
    counts = [int(quota) for quota in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: (counts[number] - exact[number], number))
    for number in by_remainder[: sum(sizes) - sum(counts)]:
        counts[number] += 1
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise UserError(
                f"{source.section}.weight: {source.weight} of {float(sum(weights)):g} is less than one of the {sum(sizes)} "
                f"samples of an epoch; raise it, or leave {source.name} out"
            )
    return counts


def hold_out(sources: Sequence[DataSource], parts: Sequence[Samples], share: float) -> list[tuple[Samples, Samples]]:
    """The samples of each source to train on, and those that are held out.

    Records are chosen by digests of what they say: a source's smallest, ``share`` of them and at least one. All samples of equal
    records, in all sources, are held out together, so that nothing held out is trained on. The choice depends on the records
    alone: neither on their order, the seed and the ranks, nor on the tokenizer.

    Raises:
        UserError: nothing would be left of a source to train on.
    """
    chosen = []
    for part in parts:
        distinct = np.unique(part.records)
        chosen.append(distinct[: max(1, round(share * len(distinct)))])
    of_all = np.concatenate(chosen)
    found = []
    for source, part in zip(sources, parts, strict=True):
        held_out = np.isin(part.records, of_all)
        if held_out.all():
            raise UserError(
                f"data.eval_share: {share} of {source.path} ({len(np.unique(part.records))} different records) leaves nothing to "
                "train on; give held-out data of its own (data.eval_path) instead"
            )
        found.append((_chosen(part, ~held_out), _chosen(part, held_out)))
    return found


def _chosen(samples: Samples, mask: np.ndarray) -> Samples:
    numbers = np.flatnonzero(mask)
    return dataclasses.replace(
        samples,
        table=samples.table.select(numbers),
        places=samples.places.select(numbers),
        lengths=samples.lengths[mask],
        learned=samples.learned[mask],
        records=samples.records[mask],
        digest=digests.of_parts([samples.digest, digests.of_bytes(np.packbits(mask).tobytes())]),
    )
