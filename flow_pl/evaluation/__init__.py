"""Personalize clients and evaluate both models on them: counts, metrics, convergence."""

from flow_pl.evaluation.metrics import ClientMetric

__all__ = ["ClientMetric"]
