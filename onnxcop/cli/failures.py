"""Reports of failures: a line on standard error, an object on standard output with `--json`, an exit code."""

from __future__ import annotations

import traceback

import click

from onnxcop.cli import console
from onnxcop.cli.stopping import exit_code
from onnxcop.errors import OnnxcopError


def tell_failure(error: BaseException, *, debug: bool, as_json: bool) -> int:
    """Report why a run ended, and return its exit code.

    Args:
        error: The exception that ended the run.
        debug: Whether to show the traceback.
        as_json: Whether to write a JSON object too.
    """
    if isinstance(error, click.ClickException):
        error.show()
        return _recorded(error.exit_code, "UsageError", error.format_message(), as_json)
    if isinstance(error, click.Abort | KeyboardInterrupt) and not isinstance(error.__cause__, EOFError):
        line = "stopped; no file is partly written"
        console.say(line)
        return _recorded(exit_code(error), "Stopped", line, as_json)
    cause = error.__cause__ if isinstance(error, click.Abort) and error.__cause__ else error
    if debug:
        traceback.print_exception(cause)
    message = " ".join(_message(cause, debug).split())
    console.say(f"error: {message}")
    kind = type(cause).__name__ if isinstance(cause, OnnxcopError | MemoryError) else "InternalError"
    return _recorded(1, kind, message, as_json, getattr(cause, "nearest", None))


def _message(error: BaseException, debug: bool) -> str:
    if isinstance(error, OnnxcopError):
        return str(error)
    if isinstance(error, MemoryError):
        return "this machine does not have enough memory for the model"
    hint = "" if debug else "; please report it with the output of --debug"
    return f"this is a bug in onnxcop: {type(error).__name__}: {error}{hint}"


def _recorded(code: int, kind: str, message: str, as_json: bool, nearest: float | None = None) -> int:
    if as_json:
        about = {"type": kind, "message": message} | ({} if nearest is None else {"nearest": nearest})
        console.show_json("error", {"error": about, "exit_code": code})
    return code
