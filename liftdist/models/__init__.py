"""Hugging Face models: found, checked, built without memory, cut by rows, filled by each rank with its own rows, digested.

In: a folder or a hub name. Out: a sharded model, the map between its names and the checkpoint's, a digest of its
weights. Must not know what is trained.
"""
