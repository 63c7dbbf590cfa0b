"""Handwritten digits divided among simulated writers with individual label distributions and styles; works offline.

Source: the test part of the UCI *Optical Recognition of Handwritten Digits* set in scikit-learn (1,797
images of 8 x 8). It names no writers, so these are simulated: labels skewed as by Hsu et al., *Measuring the Effects of
Non-Identical Data Distribution* (2019), and every image of a client is redrawn in that client's handwriting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that torch's own documentation uses)

from flow_pl.data.datamodule import FederatedDataModule
from flow_pl.data.store.writer import ClientData
from flow_pl.errors import ConfigurationError
from flow_pl.utils.optional import import_optional
from flow_pl.utils.rng import Stream, generator
from flow_pl.utils.validation import require_at_least_zero, require_count, require_positive


class DigitsData(FederatedDataModule):
    """Provides digits by writer; images are [1, 8, 8], from 0 (paper) to 1 (ink).

    Args:
        num_clients: number of writers among whom the 1,797 images are divided.
        dirichlet_alpha: evenness of the labels: the images of each digit are divided in proportions drawn from a
            Dirichlet distribution of this concentration; small = a writer has only a few of the digits.
        style_strength: how much the writers' styles differ: 0 = original images, 1 = rotated by up to 23 degrees,
            slanted, stretched and shifted, and with thinner or thicker strokes.
        min_size: smallest number of images of a writer; those with fewer receive images from those with most.
        **kwargs: settings of every data set, see `FederatedDataModule`; `split_seed` also selects the writers.

    Raises:
        ConfigurationError: a setting is out of range, or there are not enough images.
    """

    def __init__(
        self,
        num_clients: int = 30,
        dirichlet_alpha: float = 1.0,
        style_strength: float = 1.0,
        min_size: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_count(num_clients=num_clients, min_size=min_size)
        require_positive(dirichlet_alpha=dirichlet_alpha)
        require_at_least_zero(style_strength=style_strength)
        self._num_clients = num_clients
        self._dirichlet_alpha = dirichlet_alpha
        self._style_strength = style_strength
        self._min_size = min_size

    def options(self) -> dict[str, Any]:
        """Return all settings of the writers."""
        return {
            "num_clients": self._num_clients,
            "dirichlet_alpha": self._dirichlet_alpha,
            "style_strength": self._style_strength,
            "min_size": self._min_size,
            "split_seed": self.split_seed,
        }

    def class_count(self) -> int:
        """Return ten, one class for each digit."""
        return 10

    def clients(self) -> Iterator[ClientData]:
        """Divide the images among the writers and redraw them in each writer's handwriting.

        Yields:
            One writer after the other; images are bytes [n, 1, 8, 8].

        Raises:
            ConfigurationError: scikit-learn is not installed, or there are not enough images.
        """
        digits = import_optional("sklearn.datasets", "digits").load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        random = generator(self.split_seed, Stream.PARTITION)
        writers = divide(random, digits.target, self._num_clients, self._dirichlet_alpha, self._min_size)
        for writer, rows in enumerate(writers):
            random = generator(self.split_seed, Stream.STYLE, writer)
            drawn = in_handwriting(random, images[torch.from_numpy(rows)], self._style_strength)
            yield ClientData(f"writer_{writer:04d}", (drawn * 255).round().byte().numpy(), digits.target[rows])


def divide(
    random: np.random.Generator, labels: NDArray[Any], num_clients: int, alpha: float, min_size: int
) -> list[NDArray[Any]]:
    """Divide examples among clients with skewed labels: each label in proportions drawn from Dirichlet(alpha).

    Args:
        random: generator for the proportions and the assignment of examples.
        labels: [n] label of each example.
        num_clients: number of clients.
        alpha: concentration of the Dirichlet distribution.
        min_size: smallest number of examples of a client.

    Returns:
        For each client the indices of its examples; every example belongs to exactly one client.

    Raises:
        ConfigurationError: there are fewer than `num_clients` times `min_size` examples.
    """
    if num_clients * min_size > len(labels):
        raise ConfigurationError(
            f"num_clients is {num_clients} with min_size {min_size}, but there are only {len(labels)} examples: "
            f"set num_clients to {len(labels) // min_size} or less, or lower min_size."
        )
    owned: list[list[int]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        bounds = np.cumsum(random.dirichlet(np.full(num_clients, alpha)))[:-1] * len(rows)
        for client, share in enumerate(np.split(rows, np.rint(bounds).astype(int))):
            owned[client].extend(share.tolist())
    for rows_of_client in owned:
        while len(rows_of_client) < min_size:
            largest = max(owned, key=len)
            rows_of_client.append(largest.pop(int(random.integers(len(largest)))))
    return [np.array(rows_of_client) for rows_of_client in owned]


def in_handwriting(random: np.random.Generator, images: Tensor, strength: float) -> Tensor:
    """Redraw images in one writer's handwriting.

    Args:
        random: generator for the style.
        images: [n, 1, height, width], 0 (paper) to 1 (ink).
        strength: how strongly the style changes the images; 0 = not at all.

    Returns:
        The images, [n, 1, height, width], 0 to 1.
    """
    turn, slant, width, height, right, down, stroke = (random.uniform(-1, 1, 7) * strength).tolist()
    turn *= 0.4  # radians, 23 degrees
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shear = np.array([[1.0, 0.4 * slant], [0.0, 1.0]])
    scale = np.diag([1.25**width, 1.25**height])
    shift = np.array([[0.15 * right], [0.15 * down]])  # in halves of the image: 0.6 pixels of 8
    affine = torch.from_numpy(np.hstack([rotation @ shear @ scale, shift])).float().expand(len(images), 2, 3)
    drawn = F.grid_sample(images, F.affine_grid(affine, list(images.shape), align_corners=False), align_corners=False)
    # more or less pressure on the pen changes the amount of ink
    return drawn.clamp(0, 1).pow(2.0**-stroke)
