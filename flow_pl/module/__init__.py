"""The LightningModule that trains and evaluates a method."""

from flow_pl.module.federated import FederatedModule
from flow_pl.module.notices import EmptyRoundWarning, RejectedClientWarning
from flow_pl.module.preparation import PRECISIONS

__all__ = ["PRECISIONS", "EmptyRoundWarning", "FederatedModule", "RejectedClientWarning"]
