"""Memory, traffic and time of a run before it is submitted, by formulas over shapes.

In: a config and the model's ``config.json``. Out: bytes, seconds, and whether it fits. Must not need weights, ranks or a GPU.
"""
