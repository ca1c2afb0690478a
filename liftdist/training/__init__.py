"""One run: inputs, a sharded model with a method, steps, evaluations, checkpoints and the final export in their order.

In: a run context. Out: a trained run directory. Must not know schedulers or how it was launched.
"""
