"""Proof of the operator rules: every rule against the real operator."""
