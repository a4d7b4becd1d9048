"""Which channels of which tensors must be removed together.

It may import `graph`, `runtime` and `_base`. Start at `atoms`, then `ops/context`, `tracing` and `groups`.
"""
