"""The command line: commands, options, and output on the terminal.

It may import everything; nothing imports it. Start at `main`, then `options`.
"""
