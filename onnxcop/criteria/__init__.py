"""Importance of channels: COP and the baselines, and the registry that names them.

It may import `reconstruction` and the packages below it. Start at `base`, then `cop`.
"""
