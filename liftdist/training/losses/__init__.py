"""Losses, one per file: ``per_token(logits, labels)``. Must not know models or chunks.

:data:`liftdist.registry.LOSSES` lists them.
"""
