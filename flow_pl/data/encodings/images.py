"""Encode images with a label."""

from __future__ import annotations

import numpy as np

from flow_pl.data.encodings.encoding import Encoding, Rows, Vocabularies
from flow_pl.data.encodings.values import Columns, class_numbers, number_column
from flow_pl.errors import DataError
from flow_pl.utils.validation import given, require_count, require_some


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
        images = number_column(columns[self.image], self.image)
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
