"""Encode rows of numbers with a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.encodings.encoding import Encoding, Rows, Vocabularies
from flow_pl.data.encodings.values import Columns, class_numbers, float_column, number_column, real_numbers
from flow_pl.data.store.features import Features
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.utils.validation import given, require_choice, require_count, require_some


class Vectors(Encoding):
    """Encodes rows of numbers with a label in single precision.

    Args:
        features: column of the features, or several columns of numbers, which are joined. For a model that takes a
            mapping of tensors, a mapping from each name to its column, or to several to be joined, such as
            {input_ids: ids, attention_mask: mask}; in a mapping, lists of integers are kept (tokens).
        label: column of the labels.
        num_classes: number of classes; null = the largest label + 1.
        classes: names of the classes in the order of their numbers, if labels are texts; null = labels are numbers.
        labels: "classes", or "values" for a regression: real numbers, of which NaN and null are to be predicted.

    Raises:
        ConfigurationError: a setting is out of its range, or classes are given for real values.
    """

    def __init__(
        self,
        features: str | list[str] | dict[str, str | list[str]] = "x",
        label: str = "y",
        num_classes: int | None = None,
        classes: list[str] | None = None,
        labels: Literal["classes", "values"] = "classes",
    ) -> None:
        require_count(**given(num_classes=num_classes))
        require_choice(("classes", "values"), labels=labels)
        if labels == "values" and (num_classes is not None or classes is not None):
            raise ConfigurationError("labels is values, which have no classes: set num_classes and classes to null.")
        groups = {f"features.{name}": each for name, each in features.items()} if isinstance(features, dict) else {}
        require_some(
            features=features if isinstance(features, str) else list(features), **groups, **given(classes=classes)
        )
        self.features = features
        self.label = label
        self.num_classes = num_classes
        self.classes = classes
        self.labels = labels

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of features and labels."""
        groups = self.features.values() if isinstance(self.features, dict) else [self.features]
        names = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
        return *dict.fromkeys(names), self.label

    def class_count(self, vocabularies: Vocabularies) -> int | None:
        """Return the configured number of classes, if any; 1 for real values."""
        return 1 if self.labels == "values" else self.num_classes

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Encode features [n, ...] in single precision and labels [n] (classes or values); see `Encoding.encode`."""
        if isinstance(self.features, dict):
            found = {name: _joined(columns, group, _tokens_kept) for name, group in self.features.items()}
            x: Features = {name: each if each.ndim > 1 else each[:, None] for name, each in found.items()}
        else:
            x = _joined(columns, self.features, float_column)
        column = columns[self.label]
        if self.labels == "values":
            return Rows(x, real_numbers(column, self.label))
        return Rows(x, class_numbers(column, self.label, self.classes))


def _joined(
    columns: Columns, names: str | list[str], read: Callable[[Sequence[Any], str], NDArray[Any]]
) -> NDArray[Any]:
    """Return a column, or several joined along a new last axis."""
    if isinstance(names, str):
        return read(columns[names], names)
    found = {name: read(columns[name], name) for name in names}
    shapes = {name: part.shape for name, part in found.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"has {shapes}, which cannot be joined: they must have equal shapes.")
    return np.stack(list(found.values()), axis=-1)


def _tokens_kept(column: Sequence[Any], name: str) -> NDArray[Any]:
    values = number_column(column, name)
    if values.ndim > 1 and values.dtype.kind in "iu":
        return values.astype(np.int64)  # the same type for every client
    return float_column(column, name)
