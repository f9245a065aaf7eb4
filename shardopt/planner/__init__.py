"""The needs of a job before it runs: memory, traffic, time of a step, checkpoints, scaling.

Bytes and messages come from ``layout``, which the optimizer itself uses, and are exact. Times are
computed from the speeds of a ``Machine``: they are estimates, and what a simulation says is called
simulated wherever it is shown.
"""
