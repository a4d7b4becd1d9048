"""Shared code of tests of the command line."""

from __future__ import annotations

CPU = ["--provider", "cpu", "--threads", "1"]
BARE = [*CPU, "--recover", "none", "--latency-seconds", "0"]  # the quickest run of the main form
WARNING = "warning: no calibration data: "


def lines(text: str) -> list[str]:
    """Lines that say something, but for the warning of every run without data."""
    found = [line for line in text.splitlines() if line.strip()]
    return [line for line in found if not line.startswith(WARNING)]
