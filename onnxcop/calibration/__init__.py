"""Statistics of the inputs of layers, computed inside the instrumented graph.

It may import `data` and the packages below it. Start at `calibrate`, then `instrument`.
"""
