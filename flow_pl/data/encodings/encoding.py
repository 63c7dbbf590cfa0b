"""Encode a client's published examples as rows of numbers; one class per kind of example.

An encoding knows its columns but not files; a reader knows files but not the meaning of their columns. Any reader works
with any encoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flow_pl.data.encodings.vocabulary import Vocabulary
from flow_pl.data.store.features import Features
from flow_pl.errors import DataError, brief
from flow_pl.utils.validation import given, require_count, require_some

Columns = Mapping[str, Sequence[Any]]
"""A client's examples: columns by name, all of the same length, of numbers, arrays, texts or JSON values."""

Vocabularies = Mapping[str, Vocabulary]
"""Vocabularies by their names in an encoding."""


class Rows(NamedTuple):
    """Holds a client's examples as stored.

    Attributes:
        x: [n, ...] features, or several by name; the number of rows may differ from that of the examples.
        y: [n] or [n, ...] targets.
    """

    x: Features
    y: NDArray[Any]


class VocabularySource(NamedTuple):
    """Describes where a vocabulary comes from.

    Attributes:
        size: largest number of tokens.
        characters: the tokens, each a character; None = not known in advance.
        path: file of the tokens, see `read_tokens`; None = no file. Without both, the tokens are the most frequent ones
            of the training clients.
    """

    size: int
    characters: str | None = None
    path: str | None = None

    @property
    def is_counted(self) -> bool:
        """Return whether the tokens are counted over the training clients."""
        return self.path is None and self.characters is None


class Encoding(ABC):
    """Turns examples into rows; the settings of a subclass are its public attributes, of JSON types."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns to read."""

    @abstractmethod
    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Turn one client's examples into rows.

        Args:
            columns: the examples, at least one.
            vocabularies: the vocabularies that `vocabularies` asks for, by name.

        Returns:
            The rows, of the same shape and type for every client.

        Raises:
            UnusableError: there is no row.
            DataError: the examples do not suit the encoding.
        """

    def can_be_learned_from(self, rows: Rows) -> bool:
        """Return whether a client's training rows hold more than unknown tokens."""
        return True

    def options(self) -> dict[str, Any]:
        """Return everything that the rows depend on, as JSON types."""
        return {"encoding": type(self).__name__, **vars(self)}

    def vocabularies(self) -> dict[str, VocabularySource]:
        """Return the sources of the necessary vocabularies, by name."""
        return {}

    def tokens(self, columns: Columns) -> Iterable[tuple[str, Iterable[str]]]:
        """Yield the tokens of one client's examples to count, each with the name of its vocabulary."""
        return ()

    def class_count(self, vocabularies: Vocabularies) -> int | None:
        """Return the number of classes; None = the largest label + 1."""
        return None

    def label_names(self) -> Sequence[str]:
        """Return the class names in the order of their numbers; empty if unnamed."""
        return getattr(self, "classes", None) or ()

    def token_names(self) -> Sequence[str]:
        """Return the tokens in the order of their numbers, unless `vocabularies` has them; otherwise none."""
        return ()

    def unpack(self, x: Tensor) -> Tensor:
        """Undo what saves space in the store; runs on the device.

        Args:
            x: features as stored, with any leading axes; one of several by name.

        Returns:
            The features, which `FederatedDataModule.transform` turns into inputs of a model.
        """
        return x


class Images(Encoding):
    """Encodes images with a label as bytes, with the channels first.

    Args:
        image: column of the images: [height, width], [height, width, channels], [channels, height, width], or
            flattened; bytes, booleans, or numbers from 0 to 1, which are rounded to 256 levels. If all numbers of a
            data set are 0 or 1, they are not scaled. Grey images may have three channels.
        label: column of the labels.
        height: number of rows of an image.
        width: number of columns of an image.
        channels: number of channels.
        num_classes: number of classes; null = the largest label + 1.
        classes: names of the classes in the order of their numbers, if labels are texts; null = labels are numbers.
    """

    def __init__(
        self,
        image: str = "image",
        label: str = "label",
        height: int = 28,
        width: int = 28,
        channels: int = 1,
        num_classes: int | None = None,
        classes: list[str] | None = None,
    ) -> None:
        require_count(height=height, width=width, channels=channels, **given(num_classes=num_classes))
        require_some(**given(classes=classes))
        self.image = image
        self.label = label
        self.height = height
        self.width = width
        self.channels = channels
        self.num_classes = num_classes
        self.classes = classes

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of images and labels."""
        return self.image, self.label

    def class_count(self, vocabularies: Vocabularies) -> int | None:
        """Return the configured number of classes, if any."""
        return self.num_classes

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Encode images as bytes [n, channels, height, width] and labels [n]; see `Encoding.encode`."""
        images = _array(columns[self.image], self.image)
        shape = (self.height, self.width, self.channels)
        found, channels_first = images.shape[1:], (self.channels, self.height, self.width)
        flat, grey = (
            (self.height * self.width * self.channels,),
            (self.height, self.width) if self.channels == 1 else shape,
        )
        if self.channels == 1 and found == (self.height, self.width, 3) and (images == images[..., :1]).all():
            images = images[..., 0]  # grey, stored with three channels
        elif found == channels_first != shape:
            images = np.moveaxis(images, 1, -1)
        elif found not in (shape, flat, grey):
            raise DataError(f"has images of shape {found}, expected {shape}: set height, width, channels.")
        if images.dtype.kind == "b":
            images = images * np.uint8(255)
        elif images.dtype.kind == "f":
            if not (images.min() >= 0 and images.max() <= 1):
                raise DataError(
                    f"has pixels from {images.min()} to {images.max()}, expected numbers from 0 to 1: divide them by "
                    "the largest one possible, or write them as bytes."
                )
            images = np.rint(images * 255)
        elif images.min() < 0 or images.max() > 255:
            raise DataError(f"has pixels from {images.min()} to {images.max()}, expected bytes from 0 to 255.")
        pixels = images.astype(np.uint8).reshape(-1, *shape).transpose(0, 3, 1, 2)
        return Rows(pixels, class_numbers(columns[self.label], self.label, self.classes))


class Vectors(Encoding):
    """Encodes rows of numbers with a label in single precision.

    Args:
        features: column of the features, or several columns of numbers, which are joined. For a model that takes a
            mapping of tensors, a mapping from each name to its column, or to several to be joined, such as
            {input_ids: ids, attention_mask: mask}; in a mapping, lists of integers are kept (tokens).
        label: column of the labels.
        num_classes: number of classes; null = the largest label + 1.
        classes: names of the classes in the order of their numbers, if labels are texts; null = labels are numbers.
    """

    def __init__(
        self,
        features: str | list[str] | dict[str, str | list[str]] = "x",
        label: str = "y",
        num_classes: int | None = None,
        classes: list[str] | None = None,
    ) -> None:
        require_count(**given(num_classes=num_classes))
        groups = {f"features.{name}": each for name, each in features.items()} if isinstance(features, dict) else {}
        require_some(
            features=features if isinstance(features, str) else list(features), **groups, **given(classes=classes)
        )
        self.features = features
        self.label = label
        self.num_classes = num_classes
        self.classes = classes

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of features and labels."""
        groups = self.features.values() if isinstance(self.features, dict) else [self.features]
        names = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
        return *dict.fromkeys(names), self.label

    def class_count(self, vocabularies: Vocabularies) -> int | None:
        """Return the configured number of classes, if any."""
        return self.num_classes

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Encode features [n, ...] in single precision and labels [n]; see `Encoding.encode`."""
        if isinstance(self.features, dict):
            found = {name: _joined(columns, group, _tokens_kept) for name, group in self.features.items()}
            x: Features = {name: each if each.ndim > 1 else each[:, None] for name, each in found.items()}
        else:
            x = _joined(columns, self.features, _single)
        return Rows(x, class_numbers(columns[self.label], self.label, self.classes))


def texts(columns: Columns, name: str) -> list[str]:
    """Return a column of texts, which files store as bytes or as texts.

    Args:
        columns: a client's examples.
        name: name of the column.

    Returns:
        The texts; bytes that are not UTF-8 become replacement characters.

    Raises:
        DataError: an entry is not a text.
    """
    found = []
    for row, value in enumerate(columns[name]):
        if not isinstance(value, str | bytes):
            raise DataError(f"has a {type(value).__name__} in row {row} of {name!r}, expected a text.")
        found.append(value if isinstance(value, str) else value.decode("utf-8", errors="replace"))
    return found


def whole_numbers(labels: NDArray[Any]) -> NDArray[Any]:
    """Convert labels that are integers of another type to signed integers; leave others unchanged.

    Args:
        labels: labels of any numeric type and shape.

    Returns:
        The labels.
    """
    if labels.dtype.kind == "f" and ((labels == np.floor(labels)) & (np.abs(labels) < 2**53)).all():
        return labels.astype(np.int64)
    if labels.dtype == np.uint64 and (labels <= np.iinfo(np.int64).max).all():
        return labels.astype(np.int64)
    return labels


def class_numbers(column: Sequence[Any], name: str, classes: Sequence[str] | None = None) -> NDArray[Any]:
    """Return a column of labels as integers.

    Args:
        column: labels, numbers or texts.
        name: name of the column, for messages.
        classes: names of the classes in the order of their numbers; None = labels are numbers.

    Returns:
        [n] or [n, ...] classes; -1 = to be predicted.

    Raises:
        DataError: an entry is not a label.
    """
    if classes is not None or (len(column) and isinstance(column[0], str | bytes)):
        return _numbered(column, name, classes)
    labels = _array(column, name)
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        row = int(np.argwhere(np.isnan(labels))[0][0])
        raise DataError(f"has the label NaN in row {row} of {name!r}: expected 0 or more, -1 = to be predicted.")
    labels = whole_numbers(labels)  # JSON files may write 3.0 for 3
    # a single label per row may be stored as [n, 1]
    return labels.reshape(len(labels)) if labels.size == len(labels) else labels


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
    values = _array(column, name)
    if values.ndim > 1 and values.dtype.kind in "iu":
        return values.astype(np.int64)  # the same type for every client
    return _single(column, name)


def _array(column: Sequence[Any], name: str) -> NDArray[Any]:
    try:
        values = np.asarray(column)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # rows of different lengths
        raise DataError(f"has rows of different shapes in {name!r} ({brief(error)}): make them equal.") from error
    if values.dtype.kind not in "biuf":
        raise DataError(f"has values of type {values.dtype} in {name!r}, expected numbers.")
    return values


def _numbered(column: Sequence[Any], name: str, classes: Sequence[str] | None) -> NDArray[np.int64]:
    """Return the class numbers of labels that are texts; an empty one is -1."""
    if classes is None:
        raise DataError(
            f"has the label {brief(repr(column[0]))} in {name!r}: set classes in the encoding to the names of all "
            "classes."
        )
    numbers = {text: number for number, text in enumerate(classes)} | {"": -1}
    labels = [text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text for text in column]
    unknown = [label for label in labels if label is not None and label not in numbers]
    if unknown:
        raise DataError(f"has the label {brief(repr(unknown[0]))} in {name!r}, expected one of {brief(list(classes))}.")
    return np.array([-1 if label is None else numbers[label] for label in labels], dtype=np.int64)


def _single(column: Sequence[Any], name: str) -> NDArray[Any]:
    values = _array(column, name)
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    lost = np.isinf(single) & np.isfinite(values)
    if lost.any():
        row = int(np.argwhere(lost)[0][0])
        raise DataError(
            f"has {values[lost][0]} in row {row} of {name!r}, larger than the largest float32, "
            f"{float(np.finfo(np.float32).max):.8g}: rescale it, or leave that row out."
        )
    return single
