"""Encode and check the messages between the server and a node: tensors and numbers.

A message is a Flower `RecordDict`: an `ArrayRecord` of tensors in numpy's own format, which is read without unpickling,
and a `MetricRecord` of numbers. Only a node's description of itself also has names, in a `ConfigRecord`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from flow_pl.engine.training_statistics import TrainingStatistics
from flow_pl.errors import FlowError, brief
from flow_pl.utils.groups import Groups
from flow_pl.version import __version__

ARRAYS, NUMBERS, TEXTS = "arrays", "numbers", "texts"
"""Keys of the records in a message."""

FEATURES = "features"
"""Key of the input names in the texts."""

CLASSES = "class_names"
"""Key of the class names in the texts."""

MOST_FEATURES = 16
"""Largest number of named inputs of an example."""

HEADER = 4096
"""Largest overhead of numpy's format for an array, in bytes."""


class MessageError(FlowError):
    """A message that cannot be used."""


def identity_number(identity: Mapping[str, str]) -> int:
    """Return a number that identifies the package version, method and backbone, which must be equal on both sides."""
    return zlib.crc32(repr([__version__, *sorted(identity.items())]).encode())


def encode(arrays: Mapping[str, Tensor], numbers: Mapping[str, int | float | list[int]]) -> RecordDict:
    """Encode tensors and numbers as a message.

    Args:
        arrays: tensors by name.
        numbers: numbers by name.
    """
    made = ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in arrays.items()})
    return RecordDict({ARRAYS: made, NUMBERS: MetricRecord(dict(numbers))})


def array_bytes(content: RecordDict) -> int:
    """Return the number of bytes of the tensors in a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def decode_arrays(content: RecordDict, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decode the tensors of a message.

    Args:
        content: the message.
        expected: tensors with the expected names, shapes and types.

    Returns:
        Tensors by name, in the order of `expected`, on the CPU.

    Raises:
        MessageError: a tensor is missing, unknown, of another shape or type, or not finite.
    """
    record = content.array_records.get(ARRAYS) or ArrayRecord()
    others = [name for name in record if name not in expected]
    if others:
        raise MessageError(f"it has a tensor {brief(others[0])!r}, which the other side's model lacks")
    return {name: _decode(name, record.get(name), like) for name, like in expected.items()}


def _decode(name: str, array: Any, like: Tensor) -> Tensor:
    if array is None:
        raise MessageError(f"the tensor {name} is missing")
    shape, dtype = list(like.shape), str(like.dtype).removeprefix("torch.")
    if list(array.shape) != shape or array.dtype != dtype:
        raise MessageError(
            f"the tensor {name} has shape {list(array.shape)} of {brief(array.dtype)}, expected {shape} of {dtype}"
        )
    tensor = _read(name, array, like.numel() * like.element_size())
    if list(tensor.shape) != shape or tensor.dtype != like.dtype:
        raise MessageError(
            f"the tensor {name} holds shape {list(tensor.shape)} of {tensor.dtype}, expected {shape} of {dtype}"
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise MessageError(f"the tensor {name} is not finite")
    return tensor


def _read(name: str, array: Any, size: int) -> Tensor:
    """Read an array's values, unless it has more bytes than it should."""
    if len(array.data) > size + HEADER:
        raise MessageError(f"the tensor {name} takes {len(array.data)} bytes, expected {size}")
    try:
        # numpy's format, with allow_pickle off
        return torch.from_numpy(np.ascontiguousarray(array.numpy()).reshape(array.shape))
    except (TypeError, ValueError, EOFError, OSError) as error:
        raise MessageError(f"the tensor {name} cannot be read ({brief(error)})") from error


def decode_counts(content: RecordDict, fields: Mapping[str, bool]) -> dict[str, Tensor]:
    """Decode the counts of an evaluation, each [1, ...] in float32.

    Args:
        content: the message.
        fields: names of the allowed counts; True for the required ones.

    Raises:
        MessageError: a count is missing, unknown, negative or not finite.
    """
    record = content.array_records.get(ARRAYS) or ArrayRecord()
    missing = [name for name, needed in fields.items() if needed and name not in record]
    others = [name for name in record if name not in fields]
    if missing or others:
        raise MessageError(f"it has no count {missing[0]}" if missing else f"it has a count {brief(others[0])!r}")
    counts = {}
    for name, array in record.items():
        shape = tuple(array.shape)
        if len(shape) not in (1, 2) or shape[0] != 1 or any(n < 0 or n > HEADER for n in shape):
            raise MessageError(f"the count {name} has shape {list(shape)}, expected one row")
        counts[name] = _decode(name, array, torch.empty(shape))
        if (counts[name] < 0).any():
            raise MessageError(f"the count {name} is negative")
    return counts


def number(content: RecordDict, name: str, kind: type[int] | type[float] = int, least: float | None = None) -> Any:
    """Return a number of a message.

    Args:
        content: the message.
        name: name of the number.
        kind: type of the number.
        least: smallest allowed value; None for any.

    Raises:
        MessageError: the number is missing, of another type, not finite or too small.
    """
    value = (content.metric_records.get(NUMBERS) or MetricRecord()).get(name)
    if type(value) is not kind or not np.isfinite(value) or (least is not None and value < least):
        raise MessageError(f"{name} is {brief(value)}, expected {kind.__name__}" + (f" >= {least:g}" if least else ""))
    return value


def shape(content: RecordDict, name: str) -> tuple[int, ...]:
    """Return a shape in a message, without its first axis, that of a single example.

    Raises:
        MessageError: the value is not a shape.
    """
    value = (content.metric_records.get(NUMBERS) or MetricRecord()).get(name)
    if not isinstance(value, list) or len(value) > 8 or not all(type(n) is int and 0 < n < 2**31 for n in value):
        raise MessageError(f"{name} is {brief(value)}, expected a shape")
    return tuple(int(n) for n in value[1:])


def keyed(name: str, feature: str | None) -> str:
    """Return the key of a number of an input; None for a single input without a name."""
    return name if feature is None else f"{name}/{feature}"


def feature_names(texts: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the input names in a message's texts; None for a single input.

    Raises:
        MessageError: the names are invalid.
    """
    names = texts.get(FEATURES)
    if names is None:
        return None
    if not (isinstance(names, list) and 0 < len(set(names)) == len(names) <= MOST_FEATURES):
        raise MessageError(f"{FEATURES} is {brief(names)}, expected 1 to {MOST_FEATURES} names")
    if not all(isinstance(name, str) for name in names):
        raise MessageError(f"{FEATURES} is {brief(names)}, expected names")
    return tuple(names)


def class_names(texts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the class names in a message's texts; none if the labels are numbers.

    Raises:
        MessageError: the names are invalid.
    """
    names = texts.get(CLASSES, [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise MessageError(f"{CLASSES} is {brief(names)}, expected names")
    return tuple(names)


def flat(groups: Groups) -> dict[str, Tensor]:
    """Flatten groups to tensors by name, as in "global/0.weight"."""
    return {f"{group}/{key}": tensor for group, tensors in groups.items() for key, tensor in tensors.items()}


def grouped(tensors: Mapping[str, Tensor]) -> Groups:
    """Invert `flat`."""
    groups: Groups = {}
    for name, tensor in tensors.items():
        group, _, key = name.partition("/")
        groups.setdefault(group, {})[key] = tensor
    return groups


class ReceivedStatistics(TrainingStatistics):
    """Training statistics summed over several nodes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._sums: dict[str, Tensor] = {}

    def add(self, content: RecordDict, groups: tuple[str, ...]) -> None:
        """Add the statistics of one node.

        Args:
            content: message of the node.
            groups: names of the groups that are trained.

        Raises:
            MessageError: a number is missing or invalid.
        """
        rows, examples = number(content, "rows", least=0), number(content, "examples", least=0)
        sums = {
            name: [number(content, f"loss_{name}", float), number(content, f"steps_{name}", float, 0)]
            for name in groups
        }
        self.add_rows(rows, examples)
        for name, values in sums.items():
            added = torch.tensor(values, device=self.skipped.device)
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def losses(self, groups: tuple[str, ...]) -> Tensor:
        """Return, for each group, sum and number of its finite losses over clients and steps: [groups, 2]."""
        nothing = self.skipped.new_zeros(2)
        sums = [self._sums.get(name, nothing) for name in groups]
        return torch.stack(sums) if sums else self.skipped.new_zeros(0, 2)
