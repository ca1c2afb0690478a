"""Which weights of a matrix are trained, one rule per file, see :data:`liftdist.registry.CRITERIA`. Must not know ranks."""
