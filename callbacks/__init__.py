"""Callbacks for federated runs: what is measured on the clients, shown, and written to disk."""

from callbacks.generalized_accuracy import GeneralizedAccuracy
from callbacks.personalization_gain import PersonalizationGain
from callbacks.personalized_accuracy import PersonalizedAccuracy
from callbacks.prediction_writer import PredictionWriter
from callbacks.results_table import ResultsTable
from callbacks.round_progress_bar import RoundProgressBar
from callbacks.routing_statistics import RoutingStatistics

__all__ = [
    "GeneralizedAccuracy",
    "PersonalizationGain",
    "PersonalizedAccuracy",
    "PredictionWriter",
    "ResultsTable",
    "RoundProgressBar",
    "RoutingStatistics",
]
