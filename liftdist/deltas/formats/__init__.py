"""Export formats, one a file: ``write(delta, base, target, dtype)``, see :data:`liftdist.registry.EXPORT_FORMATS`."""
