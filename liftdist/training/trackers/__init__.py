"""Where a run's figures are recorded, one a file: ``start(run_dir, after)``, see :data:`liftdist.registry.TRACKERS`."""
