"""Images: how they become inputs, by presets, by what a model declares, or by a guess.

It may import `graph` and the packages below it. Start at `preprocess`, then `reader`.
"""
