"""The weights of a run while it trains, for others to follow: a folder of versions, each the difference to the one before.

In: checkpoints of a run, or the state of its ranks. Out: version folders, and what changed for those who follow. Must not know
how weights were trained; what follows imports neither transformers nor FSDP.
"""
