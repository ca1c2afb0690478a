"""Destinations of a run's metrics, one per file: ``start(run_dir, after)``, see :data:`liftdist.registry.TRACKERS`."""
