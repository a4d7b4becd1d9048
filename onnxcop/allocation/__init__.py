"""How much of each group is removed: resources, budgets, limits, greedy choice, sensitivity curves, spending.

It may import `criteria` and the packages below it.
Start at `resources` and `greedy`; the default method starts at `sensitivity` and `spend`.
"""
