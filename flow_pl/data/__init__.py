"""Federated data: the client store, splits, the cohort sampler and the data modules."""

from flow_pl.data.arrays import ArrayData
from flow_pl.data.batch import GLOBAL, LOCAL, Chunk, ClientBatch, Examples, part_sizes
from flow_pl.data.datamodule import FederatedDataModule
from flow_pl.data.dataset import ClientDataset
from flow_pl.data.digits import DigitsData
from flow_pl.data.federation import Federation, Split
from flow_pl.data.sampler import CohortSampler
from flow_pl.data.store import ClientRows, ClientStore
from flow_pl.data.synthetic import SyntheticData
from flow_pl.data.writer import ClientData, ClientStoreWriter

__all__ = [
    "GLOBAL",
    "LOCAL",
    "ArrayData",
    "Chunk",
    "ClientBatch",
    "ClientData",
    "ClientDataset",
    "ClientRows",
    "ClientStore",
    "ClientStoreWriter",
    "CohortSampler",
    "DigitsData",
    "Examples",
    "FederatedDataModule",
    "Federation",
    "Split",
    "SyntheticData",
    "part_sizes",
]
