"""Federated data: the client store, splits, the cohort sampler and the data modules."""

from flow_pl.data.arrays import ArrayData
from flow_pl.data.batch import GLOBAL, LOCAL, Chunk, ClientBatch, Examples, part_sizes
from flow_pl.data.datamodule import FederatedDataModule
from flow_pl.data.dataset import ClientDataset
from flow_pl.data.digits import DigitsData
from flow_pl.data.download import Archive
from flow_pl.data.encoded import EncodedData
from flow_pl.data.encoding import Encoding, Images, Vectors
from flow_pl.data.federation import Federation, Split
from flow_pl.data.hdf5 import HDF5Data
from flow_pl.data.leaf import LeafData
from flow_pl.data.leaf_text import CharacterAfterWindow, TokenSequences
from flow_pl.data.partitioned import PartitionedData
from flow_pl.data.releases import (
    Cifar100Data,
    EmnistData,
    ReleasedData,
    ShakespeareData,
    StackOverflowData,
    StackOverflowTagsData,
)
from flow_pl.data.sampler import CohortSampler
from flow_pl.data.store import ClientRows, ClientStore
from flow_pl.data.synthetic import SyntheticData
from flow_pl.data.tags import TagPrediction
from flow_pl.data.text import NextCharacter, NextWord
from flow_pl.data.vocabulary import BOS, EOS, OOV, PAD, Vocabulary
from flow_pl.data.writer import ClientData, ClientStoreWriter

__all__ = [
    "BOS",
    "EOS",
    "GLOBAL",
    "LOCAL",
    "OOV",
    "PAD",
    "Archive",
    "ArrayData",
    "CharacterAfterWindow",
    "Chunk",
    "Cifar100Data",
    "ClientBatch",
    "ClientData",
    "ClientDataset",
    "ClientRows",
    "ClientStore",
    "ClientStoreWriter",
    "CohortSampler",
    "DigitsData",
    "EmnistData",
    "EncodedData",
    "Encoding",
    "Examples",
    "FederatedDataModule",
    "Federation",
    "HDF5Data",
    "Images",
    "LeafData",
    "NextCharacter",
    "NextWord",
    "PartitionedData",
    "ReleasedData",
    "ShakespeareData",
    "Split",
    "StackOverflowData",
    "StackOverflowTagsData",
    "SyntheticData",
    "TagPrediction",
    "TokenSequences",
    "Vectors",
    "Vocabulary",
    "part_sizes",
]
