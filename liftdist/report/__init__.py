"""Pages and tables of what runs and deltas did: curves, ends and restarts, evaluations, and where the principal weights lie.

In: run directories, also of runs that go on, that died, or that other versions began. Out: one page that needs nothing else, or a
table. Must not write into a run directory, and not know how a run is trained.
"""
