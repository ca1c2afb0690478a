"""Losses, one per file: ``summed(logits, labels, weights)``. Must not know models or chunks.

:data:`liftdist.registry.LOSSES` lists them.
"""
