"""What is measured on a model during a run: one a file, ``run(context, inputs, model)``.

They stand in :data:`liftdist.registry.EVALUATIONS`.

In: a model, sharded or not, and inputs. Out: figures by tag. Must not change the model, nor know checkpoints.
"""
