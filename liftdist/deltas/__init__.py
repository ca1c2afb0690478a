"""What a run changed, as exact sparse differences to a base model: written, read, applied, undone, swapped, merged, exported.

In: checkpoints of a run or two model folders. Out: delta files, model folders, adapters. Must not know how weights were trained.
"""
