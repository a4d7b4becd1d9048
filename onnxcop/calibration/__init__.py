"""Statistics of what flows between layers, computed inside the instrumented graph.

It may import `data` and the packages below it. Start at `calibrate`, then `instrument`.
"""
