"""Callbacks for federated runs: they measure the clients, show the results and write them to disk."""

from flow_pl.callbacks._base import EvaluationCallback
from flow_pl.callbacks.backdoor_success import BackdoorSuccess
from flow_pl.callbacks.client_results import ClientResults
from flow_pl.callbacks.convergence_diagnostics import ConvergenceDiagnostics
from flow_pl.callbacks.generalized_accuracy import GeneralizedAccuracy
from flow_pl.callbacks.learning_curves import LearningCurves
from flow_pl.callbacks.personalization_gain import PersonalizationGain
from flow_pl.callbacks.personalized_accuracy import PersonalizedAccuracy
from flow_pl.callbacks.prediction_writer import PredictionWriter
from flow_pl.callbacks.results_table import ResultsTable
from flow_pl.callbacks.round_progress_bar import RoundProgressBar
from flow_pl.callbacks.routing_report import RoutingReport
from flow_pl.callbacks.routing_statistics import RoutingStatistics
from flow_pl.callbacks.run_folder import BestCheckpoint, LastCheckpoint, RunFolder
from flow_pl.callbacks.thread_tuner import ThreadTuner
from flow_pl.callbacks.wandb_results import WandbResults
from flow_pl.callbacks.wandb_run import WandbRun

__all__ = [
    "BackdoorSuccess",
    "BestCheckpoint",
    "ClientResults",
    "ConvergenceDiagnostics",
    "EvaluationCallback",
    "GeneralizedAccuracy",
    "LastCheckpoint",
    "LearningCurves",
    "PersonalizationGain",
    "PersonalizedAccuracy",
    "PredictionWriter",
    "ResultsTable",
    "RoundProgressBar",
    "RoutingReport",
    "RoutingStatistics",
    "RunFolder",
    "ThreadTuner",
    "WandbResults",
    "WandbRun",
]
