"""Families: many models pruned to many budgets, as one list of independent jobs that can be stopped and continued."""
