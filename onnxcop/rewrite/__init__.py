"""From a plan or a selection of channels to the smaller model.

It may import `analysis` and the packages below it. Start at `apply`, then `edit` and `sizes`.
"""
