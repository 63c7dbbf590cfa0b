"""Personalize clients and evaluate both models on them: counts, metrics, convergence."""
