"""Processes and how they agree: the device mesh, the collectives, how rows are cut.

In: what torchrun set in the environment. Out: a mesh, decisions that all ranks take alike. Must not know models or settings.
"""
