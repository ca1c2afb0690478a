"""How many weights of each matrix are trained, one rule per file, see :data:`liftdist.registry.BUDGETS`."""
