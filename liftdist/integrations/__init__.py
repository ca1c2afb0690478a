"""Other people's trainers, on several ranks: transformers' ``Trainer``, TRL's ``SFTTrainer`` and ``DPOTrainer``.

In: such a trainer's arguments, and those of :class:`liftdist.engine.principal.PrincipalWeights`. Out: a trainer that trains the
principal weights. Must not know settings, run directories or the trainer of this project.
"""
