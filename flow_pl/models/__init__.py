"""Backbones: any `torch.nn.Module` can be routed; these are the ones that the experiments use."""

from flow_pl.models.adapters import LoRA
from flow_pl.models.cnn import EMNISTCNN
from flow_pl.models.dropout import Dropout
from flow_pl.models.language import NextCharacterLSTM, NextWordLSTM
from flow_pl.models.logistic import LogisticRegression
from flow_pl.models.mlp import MLP
from flow_pl.models.recurrent import LSTM, Recurrent
from flow_pl.models.resnet import ResNet18
from flow_pl.models.text import TextEncoder
from flow_pl.models.vit import VisionTransformer

__all__ = [
    "EMNISTCNN",
    "LSTM",
    "MLP",
    "Dropout",
    "LoRA",
    "LogisticRegression",
    "NextCharacterLSTM",
    "NextWordLSTM",
    "Recurrent",
    "ResNet18",
    "TextEncoder",
    "VisionTransformer",
]

BACKBONES = (
    EMNISTCNN,
    LoRA,
    LogisticRegression,
    MLP,
    NextCharacterLSTM,
    NextWordLSTM,
    ResNet18,
    TextEncoder,
    VisionTransformer,
)
"""The whole models among these classes; the others are layers of one."""
