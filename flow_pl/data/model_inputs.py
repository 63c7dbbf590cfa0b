"""Turn stored features into what a model receives: those of a few examples, or of a chunk on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.data.federation import Ints
from flow_pl.data.store.features import Features
from flow_pl.errors import ConfigurationError
from flow_pl.utils.inputs import Inputs, described, map_inputs

if TYPE_CHECKING:
    from flow_pl.data.datamodule import FederatedDataModule


def transformed_rows(data: FederatedDataModule, features: Features, rows: Ints) -> Inputs:
    """Return some rows of a client's stored features as passed to a model.

    Args:
        data: the data, whose `transform` is applied.
        features: all rows of the client.
        rows: indices of the rows [n].

    Returns:
        Features [n, ...], a mapping for several inputs.
    """
    return map_inputs(lambda x: data.transform(torch.from_numpy(x[rows])), features)


def first_examples(data: FederatedDataModule, most: int) -> Inputs:
    """Return the features of the first training examples of the first seen client, as passed to a model.

    Args:
        data: the data, set up.
        most: number of examples; fewer if the client has fewer.
    """
    client = int(data.federation.seen[0])
    rows = data.federation.split(client).train[:most]
    return transformed_rows(data, data.federation.store.read(client).x, rows)


def transformed_chunk(data: FederatedDataModule, batch: ClientBatch) -> ClientBatch:
    """Return a chunk of clients with the features of all its examples as passed to a model.

    Args:
        data: the data, whose `transform` is applied.
        batch: the chunk with features as stored.
    """
    heldout = None if batch.heldout is None else _transformed(data, batch.heldout)
    return replace(batch, train=_transformed(data, batch.train), heldout=heldout)


def shape_of(example: Inputs) -> tuple[int, ...]:
    """Return the shape of one example [1, ...], without its leading axis.

    Raises:
        ConfigurationError: there are several inputs by name.
    """
    if isinstance(example, dict):
        raise ConfigurationError(
            f"an example has several inputs ({described(example)}), so no single shape: use those of example()."
        )
    return tuple(example.shape[1:])


def _transformed(data: FederatedDataModule, examples: Examples) -> Examples:
    x = map_inputs(data.transform, examples.x)
    # Lightning converts a batch to the run's precision before the transform, so the result is converted again
    return replace(examples, x=x if data.trainer is None else data.trainer.precision_plugin.convert_input(x))
