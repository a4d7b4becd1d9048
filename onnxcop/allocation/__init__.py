"""How much of each group is removed: budgets, limits, greedy choice, sensitivity curves, spending.

It may import `criteria` and the packages below it. Start at `budget`, then `greedy`
The default method starts at `sensitivity` and `spend`.
"""
