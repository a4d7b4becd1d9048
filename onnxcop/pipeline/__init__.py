"""The public functions: prune, apply a plan, sweep, compare, profile a device, quantize.

It may import every package but `integrations` and `cli`. Start at `prune`, then `decide` and `finish`.
"""
