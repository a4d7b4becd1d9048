"""Importance of channels: COP and the baselines, one module each, found by their names.

It may import `reconstruction` and the packages below it.
Start at `base`, then `cop` and `registry`.
"""
