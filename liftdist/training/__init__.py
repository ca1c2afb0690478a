"""One run: inputs, a sharded model with a method, then steps, evaluations and checkpoints, and the final export.

In: a run context. Out: a trained run directory. Must not know schedulers or how it was launched.
"""
