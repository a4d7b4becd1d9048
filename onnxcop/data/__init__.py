"""Samples: files, arrays, images and synthetic inputs, read in batches that fit the model's inputs.

It may import `rewrite` and the packages below it. Start at `open`, then `dataset`.
"""
