"""The command line: commands, options, and what the terminal shows.

It may import everything; nothing imports it. Start at `main`, then `options`.
"""
