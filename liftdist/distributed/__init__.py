"""Processes of a run: the device mesh, collective decisions, and how rows are sharded.

In: what torchrun set in the environment. Out: a mesh, decisions that all ranks take alike. Must not know models or settings.
"""
