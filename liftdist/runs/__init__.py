"""The run directory: attempts and their claims, checkpoints, changes between attempts, and stop requests.

In: state to save, stop requests. Out: valid checkpoints, stop decisions that all ranks share. Must not know how a step is
computed.
"""
