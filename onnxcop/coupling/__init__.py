"""Which channels of which tensors must be removed together.

It may import `runtime` and the packages below it.
Start at `atoms`, then `ops/op`, `tracing` and `groups`.
"""
