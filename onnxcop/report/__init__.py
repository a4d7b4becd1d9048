"""The numbers of a run as text, HTML, Markdown, JSON, plots and in notebooks.

It may import `verification` and the packages below it. Start at `document`, then `summary`.
"""
