"""Evaluations of a model during a run, one per file: ``run(context, inputs, model)``.

:data:`liftdist.registry.EVALUATIONS` lists them.

In: a model, sharded or not, and inputs. Out: metrics by tag. Must not change the model, nor know checkpoints.
"""
