"""Rules that merge deltas, one per file, see :data:`liftdist.registry.MERGE_RULES`.

``merge(differences, *, ...)`` maps the differences ``[n, k]`` of n deltas to the base values of a tensor, in float64 and 0 where
a delta leaves a weight alone, to the merged difference ``[k]``. Its keywords are options of the command; those without a default
must be given. It may be called with no weights, to hear what it refuses.
"""
