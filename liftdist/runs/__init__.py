"""The run directory: who may write into it, what is saved there, what earlier attempts left, and how a run is stopped.

In: state to save, requests to stop. Out: checkpoints that can be trusted, decisions to stop that all ranks share. Must
not know how a step is computed.
"""
