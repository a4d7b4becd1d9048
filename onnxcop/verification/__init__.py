"""The proof: the written model equals the masked original.

It may import `recovery` and the packages below it; the masked model imports nothing that decides what is cut.
Start at `masked_model`, then `verify`.
"""
