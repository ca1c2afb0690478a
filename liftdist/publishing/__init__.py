"""Results of runs as repositories on the hub, each with a model card.

In: run directories, deltas, exported folders. Out: one commit. Must not know how a result is made, which is the exports' part.
"""
