"""Aggregations of a cohort's updates: the mean, or robust alternatives that a few bad clients cannot move far."""

from flow_pl.engine.aggregation.base import Aggregation, AggregationError, Mean
from flow_pl.engine.aggregation.cohort import CohortAggregation, CohortUpdates, Combined
from flow_pl.engine.aggregation.coordinates import CoordinateMedian, TrimmedMean
from flow_pl.engine.aggregation.geometric_median import GeometricMedian
from flow_pl.engine.aggregation.krum import Krum, MultiKrum
from flow_pl.engine.aggregation.norm_bound import NormBound

__all__ = [
    "Aggregation",
    "AggregationError",
    "CohortAggregation",
    "CohortUpdates",
    "Combined",
    "CoordinateMedian",
    "GeometricMedian",
    "Krum",
    "Mean",
    "MultiKrum",
    "NormBound",
    "TrimmedMean",
]
