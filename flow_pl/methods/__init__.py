"""Federated algorithms, one file each; every one reads like its paper's box."""

from flow_pl.methods.base import Derive, Method, Minibatch, Phase, Prediction, Step
from flow_pl.methods.fedavg import FedAvg
from flow_pl.methods.fine_tuning import FineTuning
from flow_pl.methods.flow import Flow
from flow_pl.methods.interpolation import Interpolation
from flow_pl.methods.local import Local

__all__ = [
    "Derive",
    "FedAvg",
    "FineTuning",
    "Flow",
    "Interpolation",
    "Local",
    "Method",
    "Minibatch",
    "Phase",
    "Prediction",
    "Step",
]
