"""Callbacks for federated runs: what is measured on the clients, shown, and written to disk."""

from callbacks.backdoor_success import BackdoorSuccess
from callbacks.client_results import ClientResults
from callbacks.convergence_diagnostics import ConvergenceDiagnostics
from callbacks.generalized_accuracy import GeneralizedAccuracy
from callbacks.learning_curves import LearningCurves
from callbacks.personalization_gain import PersonalizationGain
from callbacks.personalized_accuracy import PersonalizedAccuracy
from callbacks.prediction_writer import PredictionWriter
from callbacks.results_table import ResultsTable
from callbacks.round_progress_bar import RoundProgressBar
from callbacks.routing_report import RoutingReport
from callbacks.routing_statistics import RoutingStatistics
from callbacks.wandb_results import WandbResults
from callbacks.wandb_run import WandbRun

__all__ = [
    "BackdoorSuccess",
    "ClientResults",
    "ConvergenceDiagnostics",
    "GeneralizedAccuracy",
    "LearningCurves",
    "PersonalizationGain",
    "PersonalizedAccuracy",
    "PredictionWriter",
    "ResultsTable",
    "RoundProgressBar",
    "RoutingReport",
    "RoutingStatistics",
    "WandbResults",
    "WandbRun",
]
