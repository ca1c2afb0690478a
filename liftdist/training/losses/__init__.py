"""Losses, one per file: ``summed(logits, labels)``, see :data:`liftdist.registry.LOSSES`. Must not know models or chunks."""
