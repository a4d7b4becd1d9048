"""Closed-form compensation: ridge regression, OBS, refinement, principal channels, and the divergence measured.

It may import `calibration` and the packages below it. Start at `ridge`, then `obs` and `refine`.
"""
