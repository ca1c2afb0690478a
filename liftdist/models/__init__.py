"""Hugging Face models: located, checked, built on the meta device, sharded by rows, loaded by each rank, digested.

In: a folder or a hub name. Out: a sharded model, the map between its names and the checkpoint's, a digest of its
weights. Must not know what is trained.
"""
