"""Federated data: the client store, splits, the cohort sampler and the data modules."""

from flow_pl.data.batch import GLOBAL, LOCAL, Chunk, ClientBatch, Examples, part_sizes
from flow_pl.data.datamodule import FederatedDataModule
from flow_pl.data.dataset import ClientDataset
from flow_pl.data.digits import DigitsData
from flow_pl.data.encodings.encoded import EncodedData
from flow_pl.data.encodings.encoding import Encoding
from flow_pl.data.encodings.images import Images
from flow_pl.data.encodings.tags import TagPrediction
from flow_pl.data.encodings.text import NextCharacter, NextWord
from flow_pl.data.encodings.tokenized import TokenizedTexts
from flow_pl.data.encodings.vectors import Vectors
from flow_pl.data.encodings.vocabulary import BOS, EOS, OOV, PAD, Vocabulary
from flow_pl.data.federation import Federation, Split
from flow_pl.data.readers.arrays import ArrayData
from flow_pl.data.readers.download import Archive
from flow_pl.data.readers.hdf5 import HDF5Data
from flow_pl.data.readers.leaf import LeafData
from flow_pl.data.readers.leaf_text import CharacterAfterWindow, TokenSequences
from flow_pl.data.readers.partitioned import PartitionedData
from flow_pl.data.readers.releases import (
    Cifar100Data,
    EmnistData,
    ReleasedData,
    ShakespeareData,
    StackOverflowData,
    StackOverflowTagsData,
)
from flow_pl.data.sampler import CohortSampler
from flow_pl.data.store.cache import file_identity
from flow_pl.data.store.client_store import ClientRows, ClientStore
from flow_pl.data.store.writer import ClientData, ClientStoreWriter
from flow_pl.data.synthetic import SyntheticData

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
    "TokenizedTexts",
    "Vectors",
    "Vocabulary",
    "file_identity",
    "part_sizes",
]
