"""The proof: the written model equals the masked original.

It may import `recovery` and the packages below it; the masked model imports nothing of `rewrite`.
Start at `masked_model`, then `verify`.
"""
