"""Convert a user's examples to the tensors that a model takes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flow_pl.data.encodings.values import whole_numbers
from flow_pl.data.store.client_checks import check_client
from flow_pl.errors import DataError
from flow_pl.utils.inputs import Inputs, leaves, map_inputs


def as_tensor(name: str, values: Tensor | ArrayLike) -> Tensor:
    """Convert a user's values to a tensor.

    Args:
        name: name of the values, for the message.
        values: a tensor, an array, or lists of numbers.

    Raises:
        DataError: the values are not numbers.
    """
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} has values of type {array.dtype}, expected numbers.")
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def as_inputs(name: str, values: Tensor | ArrayLike | Mapping[str, Tensor | ArrayLike]) -> Inputs:
    """Convert a user's values to a tensor, or a mapping of values to tensors by name; see `as_tensor`."""
    if isinstance(values, Mapping):
        return {key: as_tensor(f"{name}[{key!r}]", each) for key, each in sorted(values.items())}
    return as_tensor(name, values)


def labelled(x: Inputs, y: Tensor, real_valued: bool) -> tuple[Inputs, Tensor]:
    """Select the examples with a label, in a model's input types: float32 or int64; labels as a data set reads them.

    Raises:
        DataError: no example has a label, or a value cannot be used.
    """
    if not y.ndim or not len(y) or not leaves(x) or any(not t.ndim or len(t) != len(y) for t in leaves(x)):
        shape = {k: list(t.shape) for k, t in x.items()} if isinstance(x, dict) else list(x.shape)
        raise DataError(
            f"x has shape {shape} and y {list(y.shape)}: expected one target for each example, and "
            "at least one example."
        )
    if real_valued:
        y = y.float()
        y = y.reshape(len(y)) if y.numel() == len(y) else y  # [N, 1], as tables store them
    else:
        numbers = whole_numbers((y.double() if y.is_floating_point() else y).detach().cpu().numpy())
        if numbers.dtype.kind == "f" or numbers.dtype == np.uint64:
            kind = str(y.dtype).removeprefix("torch.")
            raise DataError(f"y has labels of type {kind}: encode them as integers from 0, -1 = to be predicted.")
        # signed before they are compared: of a byte, -1 is 255
        y = torch.from_numpy(numbers.astype(np.int64))
    there = ~y.isnan() if real_valued else (y != -1).reshape(len(y), -1).any(1)
    if not there.any():
        none = "NaN" if real_valued else "-1"
        raise DataError(
            f"none of the {len(y)} examples has a label (all of y is {none}), expected at least one: label some of "
            "them, or serve the client with the server's model (ServerModel)."
        )
    arrays = map_inputs(lambda t: t.detach().cpu().numpy(), x)
    check_client("to be personalized", arrays, y.detach().cpu().numpy(), 0, None)

    def selected(t: Tensor) -> Tensor:
        t = t[there]
        return t if t.dtype in (torch.uint8, torch.bool) else t.float() if t.is_floating_point() else t.long()

    return map_inputs(selected, x), y[there] if real_valued else y[there].long()
