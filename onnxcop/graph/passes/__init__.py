"""Passes that prepare a graph for analysis: one file per pass.

They may import `graph` and `_base`. Start at `lift_constants`.
"""
