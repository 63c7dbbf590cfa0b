"""The format of a run's data: a client's own arrays are read as those of the run were."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flow_pl.errors import DataError, brief
from flow_pl.serving.inputs import as_inputs, as_tensor
from flow_pl.utils.checkpoints import look_at
from flow_pl.utils.inputs import Inputs


class RunFormat(NamedTuple):
    """Says how the data of a run were stored; created by `load_format`.

    Attributes:
        features: NumPy type of the stored features, by name where a model takes several; None if unknown, as in
            checkpoints of older versions: features are then used in the types that they have.
        class_names: names of the classes in the order of their numbers if the labels were texts; otherwise none.
    """

    features: str | dict[str, str] | None = None
    class_names: tuple[str, ...] = ()

    def inputs(self, x: Tensor | ArrayLike | Mapping[str, Tensor | ArrayLike]) -> Inputs:
        """Convert features to the types of the run, for `FederatedDataModule.transform`.

        Args:
            x: features [N, ...]; a mapping for several by name, of which further ones are left out.

        Raises:
            DataError: features are missing, or have a type that is not read as that of the run.
        """
        if self.features is None:
            return as_inputs("x", x)
        if isinstance(self.features, str):
            if isinstance(x, Mapping):
                raise DataError(f"there is no x, only {brief(list(x))}: the run has one array of features, x.")
            return _stored("x", as_tensor("x", x), np.dtype(self.features))
        there = x if isinstance(x, Mapping) else {}
        missing = [name for name in self.features if name not in there]
        if missing:
            found = brief(list(there)) if there else "one array"
            raise DataError(f"there is no {' and no '.join(missing)}, only {found}: name the run's features so.")
        named = as_inputs("x", {name: there[name] for name in self.features})
        assert isinstance(named, dict)
        return {name: _stored(name, each, np.dtype(self.features[name])) for name, each in named.items()}

    def labels(self, y: Tensor | ArrayLike) -> Tensor:
        """Convert labels to numbers of the run's classes.

        Args:
            y: labels [N] or [N, ...], numbers, or the names of classes, of which an empty one is to be predicted.

        Returns:
            The labels as a tensor; -1 for an empty name.

        Raises:
            DataError: a name is none of the run's classes.
        """
        values = y if isinstance(y, Tensor) else np.asarray(y)
        if isinstance(values, Tensor) or values.dtype.kind not in "US":
            return as_tensor("y", values)
        if not self.class_names:
            raise DataError(
                "y has texts, but the checkpoint holds no names of classes, since its run had numbers, or was of an "
                "older version: write the numbers of the classes."
            )
        texts = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
        numbers = {"": -1, **{name: number for number, name in enumerate(self.class_names)}}
        unknown = [text for text in np.unique(texts).tolist() if text not in numbers]
        if unknown:
            raise DataError(
                f"y has the label {unknown[0]!r}, expected one of the run's classes, {brief(list(self.class_names))}; "
                "an empty text for none."
            )
        found = np.array([numbers[text] for text in texts.reshape(-1).tolist()], dtype=np.int64)
        return torch.from_numpy(found.reshape(texts.shape))


def load_format(checkpoint: str | os.PathLike[str]) -> RunFormat:
    """Load the format of a run's data from its checkpoint; no weight is read.

    Args:
        checkpoint: checkpoint of the run.

    Raises:
        ConfigurationError: the checkpoint is missing, damaged, or not from this project.
    """
    saved = look_at(checkpoint).get("data", {})
    return RunFormat(saved.get("features"), tuple(saved.get("class_names", ())))


def _stored(name: str, values: Tensor, stored: np.dtype[np.generic]) -> Tensor:
    """Convert features to what `FederatedDataModule.transform` reads as it reads a stored type."""
    whole = not values.is_floating_point() and values.dtype != torch.bool
    if stored.kind == "b" and bool(((values == 0) | (values == 1)).all()):
        return values.bool()
    # a number of another type could be a pixel or a share of its largest value: that is not guessed
    if stored == np.uint8 and whole and bool(((values >= 0) & (values <= 255)).all()):
        return values.to(torch.uint8)
    if stored.kind == "f" and values.dtype != torch.uint8:
        return values if values.is_floating_point() else values.float()
    if stored.kind in "iu" and stored != np.uint8 and whole:
        return values.long()
    kind = str(values.dtype).removeprefix("torch.")
    expected = {"b": "zeros and ones", "f": "numbers", "u": "whole numbers from 0 to 255"}
    raise DataError(
        f"{name} has features of type {kind}, in the run they are {stored} "
        f"({'tokens' if stored.kind in 'iu' and stored != np.uint8 else expected[stored.kind]}): write them as the "
        "run's data are written."
    )
