"""What is trained, and how the trainer drives it: one method per file, see :data:`liftdist.registry.METHODS`.

In: a model on its devices, a run's context. Out: gradients reduced, steps taken, state to save. Must not know data, or the loop.
"""
