"""Independent tasks on other threads, processes or machines.

Every part of a run that consists of independent tasks hands them to a `Crew`, which gives them to an executor of
`concurrent.futures`. Results come back in the order of the tasks, so a result does not depend on the executor.

It may import `runtime` and the packages below it. Start at `crew`.
"""
