"""Sparse training of a model's matrices as one flat vector: a standalone library that needs torch and numpy only.

    matrices -> criteria, budgets -> selection -> reductions, flat -> principal -> adamw

In: a module, plain or sharded by FSDP2. Out: its principal weights as one parameter with a gradient. Must not know
configs, Hugging Face, files or runs.
"""
