"""The public functions: prune, apply a plan, sweep, compare, reach a latency, time another device.

It may import every package but `integrations` and `cli`. Start at `prune`, then `decide` and `finish`.
"""
