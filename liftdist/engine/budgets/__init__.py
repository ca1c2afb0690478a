"""How many weights of each matrix are trained, one rule a file, see :data:`liftdist.registry.BUDGETS`."""
