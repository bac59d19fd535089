"""Runs and models looked at: evaluate, diagnose, plan, the oracle of known optima.

Nothing here trains a run. Imports core to run."""
