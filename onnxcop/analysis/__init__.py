"""From a model to its structure, its cost and its linear layers.

It may import `coupling` and the packages below it. Start at `analyze`.
"""
