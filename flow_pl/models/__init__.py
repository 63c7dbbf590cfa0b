"""Backbones as sequences of blocks. Any `torch.nn.Sequential` can be routed; these are the ones of the evaluation."""

from flow_pl.models.cnn import EMNISTCNN
from flow_pl.models.logistic import LogisticRegression
from flow_pl.models.mlp import MLP

__all__ = ["EMNISTCNN", "MLP", "LogisticRegression"]
