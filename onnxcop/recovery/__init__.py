"""Rounds of measuring, cutting and reconstructing, within a budget or a quality bound.

It may import `allocation` and the packages below it. Start at `rounds`.
"""
