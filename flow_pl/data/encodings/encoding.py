"""From a client's examples as they are published to rows of numbers; one class per kind of example.

An encoding knows the columns that it needs and nothing of files; a reader knows files and nothing of what their columns
mean. Any reader goes with any encoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flow_pl.data.encodings.vocabulary import Vocabulary
from flow_pl.errors import DataError, brief
from flow_pl.utils.validation import given, require_count, require_some

Columns = Mapping[str, Sequence[Any]]
"""A client's examples: columns by name, all of one length, of numbers, arrays, texts or what JSON holds."""

Vocabularies = Mapping[str, Vocabulary]
"""Vocabularies by the name that an encoding gives them."""


class Rows(NamedTuple):
    """A client's examples as they are stored.

    Attributes:
        x: [n, ...] features; the number of rows need not be that of the examples.
        y: [n] or [n, ...] targets.
    """

    x: NDArray[Any]
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

    def unpack(self, x: Tensor) -> Tensor:
        """Undo what saves room in the store; runs on the device.

        Args:
            x: features as stored, with any leading axes.

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
        return Rows(pixels, _labels(columns[self.label], self.label, self.classes))


class Vectors(Encoding):
    """Rows of numbers with a label, stored in single precision.

    Args:
        features: column of the features; or several columns of numbers, which are joined.
        label: column of the labels.
        num_classes: number of classes; null = the largest label + 1.
        classes: names of the classes in the order of their numbers, where labels are texts; null = labels are numbers.
    """

    def __init__(
        self,
        features: str | list[str] = "x",
        label: str = "y",
        num_classes: int | None = None,
        classes: list[str] | None = None,
    ) -> None:
        require_count(**given(num_classes=num_classes))
        require_some(features=features, **given(classes=classes))
        self.features = features
        self.label = label
        self.num_classes = num_classes
        self.classes = classes

    @property
    def columns(self) -> tuple[str, ...]:
        """The features and the labels."""
        return *self._features, self.label

    @property
    def _features(self) -> tuple[str, ...]:
        return (self.features,) if isinstance(self.features, str) else tuple(self.features)

    def class_count(self, vocabularies: Vocabularies) -> int | None:
        """The number of classes given, if one is."""
        return self.num_classes

    def encode(self, columns: Columns, vocabularies: Vocabularies) -> Rows:
        """Features [n, ...] in single precision and labels [n]; see `Encoding.encode`."""
        found = [_single(columns[name], name) for name in self._features]
        if len({part.shape for part in found}) > 1:
            raise DataError(
                f"has {dict(zip(self._features, [part.shape for part in found], strict=True))}, which "
                "cannot be joined: they must have equal shapes."
            )
        x = found[0] if isinstance(self.features, str) else np.stack(found, axis=-1)
        return Rows(x, _labels(columns[self.label], self.label, self.classes))


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


def _labels(column: Sequence[Any], name: str, classes: Sequence[str] | None = None) -> NDArray[Any]:
    if classes is not None or (len(column) and isinstance(column[0], str | bytes)):
        return _numbered(column, name, classes)
    labels = _array(column, name)
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        row = int(np.argwhere(np.isnan(labels))[0][0])
        raise DataError(f"has the label NaN in row {row} of {name!r}: expected 0 or more, -1 = to be predicted.")
    labels = whole_numbers(labels)  # JSON files may write 3.0 for 3
    # files of one label a row may hold it as [n, 1]
    return labels.reshape(len(labels)) if labels.size == len(labels) else labels
