"""Samples in files that a data set is sharded into, and at URLs.

It may import `stores` and what that imports. Start at `remote`, `shards` or `parquet`.
"""
