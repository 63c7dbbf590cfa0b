"""From a client's examples as they are published to rows of numbers; one class per kind of example.

An encoding knows the columns that it needs and nothing of files; a reader knows files and nothing of what their columns
mean. Any reader goes with any encoding.
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
"""A client's examples: columns by name, all of one length, of numbers, arrays, texts or what JSON holds."""

Vocabularies = Mapping[str, Vocabulary]
"""Vocabularies by the name that an encoding gives them."""


class Rows(NamedTuple):
    """A client's examples as they are stored.

    Attributes:
        x: [n, ...] features, or several by name; the number of rows need not be that of the examples.
        y: [n] or [n, ...] targets.
    """

    x: Features
    y: NDArray[Any]


class VocabularySource(NamedTuple):
    """Where a vocabulary comes from.

    Attributes:
        size: number of tokens, if there are as many.
        characters: the tokens themselves, each a character; None = not known beforehand.
        path: file of the tokens, see `read_tokens`; None = none. Without either, the tokens are the most frequent ones
            of the training clients.
    """

    size: int
    characters: str | None = None
    path: str | None = None

    @property
    def is_counted(self) -> bool:
        """Whether the tokens are those of the training clients."""
        return self.path is None and self.characters is None


class Encoding(ABC):
    """How examples become rows. The settings of a subclass are its public attributes, of JSON types."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that are read."""

    @abstractmethod
    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Turn one client's examples into rows.

        Args:
            columns: the examples, one or more.
            vocabularies: those of `vocabularies`.

        Returns:
            The rows; of one shape and type for every client.

        Raises:
            UnusableError: there is no row.
            DataError: they are not what the encoding is for.
        """

    def can_be_learned_from(self, rows: Rows) -> bool:
        """Whether a client's training rows hold more than unknown tokens."""
        return True

    def options(self) -> dict[str, Any]:
        """Everything that the rows depend on, of JSON types."""
        return {"encoding": type(self).__name__, **vars(self)}

    def vocabularies(self) -> dict[str, VocabularySource]:
        """The vocabularies that are needed, by name."""
        return {}

    def tokens(self, columns: Columns) -> Iterable[tuple[str, Iterable[str]]]:
        """The tokens of one client's examples to count for a vocabulary, with the name of that vocabulary."""
        return ()

    def class_count(self, vocabularies: Vocabularies) -> int | None:
        """Number of classes; None = the largest label + 1."""
        return None

    def label_names(self) -> Sequence[str]:
        """Names of the classes in the order of their numbers; none where they have none."""
        return getattr(self, "classes", None) or ()

    def token_names(self) -> Sequence[str]:
        """The tokens in the order of their numbers, where they are not in a vocabulary of `vocabularies`; else none."""
        return ()

    def unpack(self, x: Tensor) -> Tensor:
        """Undo what saves room in the store; runs on the device.

        Args:
            x: features as stored, with any leading axes; of several by name, one.

        Returns:
            The features; `FederatedDataModule.transform` makes inputs of a model of them.
        """
        return x


class Images(Encoding):
    """Pictures with a label, stored as bytes with the channels first.

    Args:
        image: column of the pictures: [height, width], [height, width, channels], [channels, height, width], or as many
            numbers in a row; bytes, truth values, or fractions from 0 to 1, which are rounded to 256 levels. Where all
            numbers of a data set are 0 or 1, they are not scaled. Grey pictures may be written in three colours.
        label: column of the labels.
        height: number of rows of a picture.
        width: number of columns of a picture.
        channels: number of channels.
        num_classes: number of classes; null = the largest label + 1.
        classes: names of the classes in the order of their numbers, where labels are texts; null = labels are numbers.
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
        """The pictures and the labels."""
        return self.image, self.label

    def class_count(self, vocabularies: Vocabularies) -> int | None:
        """The number of classes given, if one is."""
        return self.num_classes

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Pictures as bytes [n, channels, height, width] and labels [n]; see `Encoding.encode`."""
        images = _array(columns[self.image], self.image)
        shape = (self.height, self.width, self.channels)
        found, channels_first = images.shape[1:], (self.channels, self.height, self.width)
        flat, grey = (
            (self.height * self.width * self.channels,),
            (self.height, self.width) if self.channels == 1 else shape,
        )
        if self.channels == 1 and found == (self.height, self.width, 3) and (images == images[..., :1]).all():
            images = images[..., 0]  # grey, written in colours
        elif found == channels_first != shape:
            images = np.moveaxis(images, 1, -1)
        elif found not in (shape, flat, grey):
            raise DataError(f"has pictures of shape {found}, expected {shape}: set height, width, channels.")
        if images.dtype.kind == "b":
            images = images * np.uint8(255)
        elif images.dtype.kind == "f":
            if not (images.min() >= 0 and images.max() <= 1):
                raise DataError(
                    f"has pixels from {images.min()} to {images.max()}, expected fractions from 0 to 1: divide them by "
                    "the largest one possible, or write them as bytes."
                )
            images = np.rint(images * 255)
        elif images.min() < 0 or images.max() > 255:
            raise DataError(f"has pixels from {images.min()} to {images.max()}, expected bytes from 0 to 255.")
        pixels = images.astype(np.uint8).reshape(-1, *shape).transpose(0, 3, 1, 2)
        return Rows(pixels, class_numbers(columns[self.label], self.label, self.classes))


class Vectors(Encoding):
    """Rows of numbers with a label, stored in single precision.

    Args:
        features: column of the features; or several columns of numbers, which are joined. For a model that takes a
            mapping of tensors, a mapping from each name to its column, or to several that are joined, such as
            {input_ids: ids, attention_mask: mask}; in it, lists of whole numbers stay what they are (tokens).
        label: column of the labels.
        num_classes: number of classes; null = the largest label + 1.
        classes: names of the classes in the order of their numbers, where labels are texts; null = labels are numbers.
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
        """The features and the labels."""
        groups = self.features.values() if isinstance(self.features, dict) else [self.features]
        names = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
        return *dict.fromkeys(names), self.label

    def class_count(self, vocabularies: Vocabularies) -> int | None:
        """The number of classes given, if one is."""
        return self.num_classes

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Features [n, ...] in single precision and labels [n]; see `Encoding.encode`."""
        if isinstance(self.features, dict):
            found = {name: _joined(columns, group, _tokens_kept) for name, group in self.features.items()}
            x: Features = {name: each if each.ndim > 1 else each[:, None] for name, each in found.items()}
        else:
            x = _joined(columns, self.features, _single)
        return Rows(x, class_numbers(columns[self.label], self.label, self.classes))


def texts(columns: Columns, name: str) -> list[str]:
    """A column of texts, which files hold as bytes or as texts.

    Args:
        columns: a client's examples.
        name: name of the column.

    Returns:
        The texts; bytes that are no UTF-8 become replacement characters.

    Raises:
        DataError: an entry is no text.
    """
    found = []
    for row, value in enumerate(columns[name]):
        if not isinstance(value, str | bytes):
            raise DataError(f"has a {type(value).__name__} in row {row} of {name!r}, expected a text.")
        found.append(value if isinstance(value, str) else value.decode("utf-8", errors="replace"))
    return found


def whole_numbers(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels as signed integers where they are whole numbers of another type, and otherwise as they are.

    Args:
        labels: of any numeric type and shape.

    Returns:
        The labels.
    """
    if labels.dtype.kind == "f" and ((labels == np.floor(labels)) & (np.abs(labels) < 2**53)).all():
        return labels.astype(np.int64)
    if labels.dtype == np.uint64 and (labels <= np.iinfo(np.int64).max).all():
        return labels.astype(np.int64)
    return labels


def class_numbers(column: Sequence[Any], name: str, classes: Sequence[str] | None = None) -> NDArray[Any]:
    """A column of labels as whole numbers.

    Args:
        column: of numbers, or of texts.
        name: name of the column, for messages.
        classes: names of the classes in the order of their numbers; None = labels are numbers.

    Returns:
        [n] or [n, ...] classes; -1 = to be predicted.

    Raises:
        DataError: a label is none.
    """
    if classes is not None or (len(column) and isinstance(column[0], str | bytes)):
        return _numbered(column, name, classes)
    labels = _array(column, name)
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        row = int(np.argwhere(np.isnan(labels))[0][0])
        raise DataError(f"has the label NaN in row {row} of {name!r}: expected 0 or more, -1 = to be predicted.")
    labels = whole_numbers(labels)  # JSON files may write 3.0 for 3
    # files of one label a row may hold it as [n, 1]
    return labels.reshape(len(labels)) if labels.size == len(labels) else labels


def _joined(
    columns: Columns, names: str | list[str], read: Callable[[Sequence[Any], str], NDArray[Any]]
) -> NDArray[Any]:
    """A column, or several that are joined along a new last axis."""
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
        return values.astype(np.int64)  # of one type for every client
    return _single(column, name)


def _array(column: Sequence[Any], name: str) -> NDArray[Any]:
    try:
        values = np.asarray(column)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # rows of several lengths
        raise DataError(f"has rows of several shapes in {name!r} ({brief(error)}): make them equal.") from error
    if values.dtype.kind not in "biuf":
        raise DataError(f"has values of type {values.dtype} in {name!r}, expected numbers.")
    return values


def _numbered(column: Sequence[Any], name: str, classes: Sequence[str] | None) -> NDArray[np.int64]:
    """Labels that are texts as the numbers of their classes; an empty one is -1."""
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
