"""Evaluations of a model during a run, one per file: ``run(context, inputs, model, method)``.

:data:`liftdist.registry.EVALUATIONS` lists them.

In: a model, sharded or not, inputs, and the method that trains it. Out: metrics by tag. Must leave the model as it was, and not
know checkpoints.
"""
