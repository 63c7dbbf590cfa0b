"""Personalized federated learning with PyTorch Lightning: one training epoch is one communication round."""

from flow_pl.engine.loop import FederatedLoop
from flow_pl.module import FederatedModule
from flow_pl.serving import load, personalize
from flow_pl.version import __version__

__all__ = ["FederatedLoop", "FederatedModule", "__version__", "load", "personalize"]
