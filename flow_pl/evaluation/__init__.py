"""Personalizes clients and evaluates both models on them: counts, metrics, convergence."""
