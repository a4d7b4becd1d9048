"""Images: preprocessing by presets, by the model's declaration, or by a guess.

It may import `graph` and the packages below it. Start at `preprocess`, then `reader`.
"""
