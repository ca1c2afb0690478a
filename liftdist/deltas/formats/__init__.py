"""Export formats, one per file: ``write(delta, base_folder, target, dtype)``, see :data:`liftdist.registry.EXPORT_FORMATS`."""
