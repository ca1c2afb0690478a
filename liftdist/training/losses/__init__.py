"""Losses, one per file: ``summed(logits, labels, weights)``, see :data:`liftdist.registry.LOSSES`. Must not know models or chunks."""
