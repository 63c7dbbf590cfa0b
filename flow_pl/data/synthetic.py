"""Synthetic(alpha, beta): generated clients that differ in their labels, their features and their sizes.

Source: Li et al., *Federated Optimization in Heterogeneous Networks* (MLSys 2020), section 5.1, with the sizes and
the scales of the authors' generator; `shared_fraction` is this project's addition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flow_pl.data.datamodule import FederatedDataModule
from flow_pl.data.store.writer import ClientData
from flow_pl.errors import ConfigurationError
from flow_pl.utils.rng import Stream, generator
from flow_pl.utils.validation import given, require_at_least_zero, require_count, require_finite, require_share

Floats = NDArray[np.float64]

LARGEST_SIZE = 10**8
"""Largest number of instances of a client; more mean wrong settings of the sizes, and would fill memory and disk."""


class Concept(NamedTuple):
    """Labels instances by a linear model: y = argmax(weight x + bias).

    Attributes:
        weight: [classes, features] weights.
        bias: [classes] biases.
    """

    weight: Floats
    bias: Floats

    def label(self, x: NDArray[Any]) -> NDArray[np.int64]:
        """Compute the labels [n] of instances [n, features]."""
        labels: NDArray[np.int64] = np.argmax(x.astype(np.float64) @ self.weight.T + self.bias, axis=1)
        return labels


@dataclass(frozen=True)
class SyntheticClients:
    """The generator behind `SyntheticData`, which documents its fields; `seed` is the data module's `split_seed`.

    A client's draws depend only on the seed and the client. Only the threshold, and hence which instances
    are labelled by the shared concept, depends on all of them.
    """

    alpha: float
    beta: float
    shared_fraction: float
    num_clients: int
    num_features: int
    num_classes: int
    mean_log_size: float
    sigma_log_size: float
    min_size: int
    max_size: int | None
    seed: int

    def __post_init__(self) -> None:
        require_count(
            num_clients=self.num_clients,
            num_features=self.num_features,
            num_classes=self.num_classes,
            min_size=self.min_size,
        )
        require_at_least_zero(alpha=self.alpha, beta=self.beta, sigma_log_size=self.sigma_log_size)
        require_share(shared_fraction=self.shared_fraction)
        require_finite(mean_log_size=self.mean_log_size)
        require_count(**given(max_size=self.max_size))
        if self.max_size is not None and self.max_size < self.min_size:
            raise ConfigurationError(
                f"max_size is {self.max_size}, expected at least min_size, which is {self.min_size}: raise it."
            )

    def __iter__(self) -> Iterator[ClientData]:
        """Yield the clients in order."""
        for client in range(self.num_clients):
            random, size, mean = self._profile(client)
            own = self._concept(random, random.normal(0, self.alpha))
            deviation = np.arange(1, self.num_features + 1) ** -0.6  # variance j^-1.2
            x = (mean + deviation * random.standard_normal((size, self.num_features))).astype(np.float32)
            y = np.where(x[:, 0] > self.threshold, self.shared_concept.label(x), own.label(x))
            yield ClientData(f"client_{client:05d}", x, y)

    @cached_property
    def shared_concept(self) -> Concept:
        """Return the labelling that all clients share."""
        return self._concept(generator(self.seed, Stream.CONCEPT), 0.0)

    @cached_property
    def threshold(self) -> float:
        """Return the value of the first feature above which the shared concept labels an instance.

        The quantile of the clients' mixture of N(v_k1, 1), each with the weight of its size, found by bisection.
        """
        if self.shared_fraction in (0, 1):
            return math.inf if self.shared_fraction == 0 else -math.inf
        profiles = [self._profile(client) for client in range(self.num_clients)]
        weight = torch.tensor([size for _, size, _ in profiles], dtype=torch.float64)
        mean = torch.tensor([mean[0] for _, _, mean in profiles], dtype=torch.float64)
        low, high = float(mean.min()) - 10, float(mean.max()) + 10
        for _ in range(80):
            middle = (low + high) / 2
            above = torch.sum(weight * torch.special.ndtr(mean - middle)) / weight.sum()
            low, high = (middle, high) if above > self.shared_fraction else (low, middle)
        return high

    def _profile(self, client: int) -> tuple[np.random.Generator, int, Floats]:
        """Return a client's generator after its first draws, its size, and the mean [features] of its instances."""
        random = generator(self.seed, Stream.SYNTHETIC, client)
        drawn = random.lognormal(self.mean_log_size, self.sigma_log_size)  # may be infinite
        size = min(self.min_size + np.floor(drawn), np.inf if self.max_size is None else self.max_size)
        if size > LARGEST_SIZE:
            raise ConfigurationError(
                f"mean_log_size is {self.mean_log_size} and sigma_log_size is {self.sigma_log_size}, by which client "
                f"{client} has {size:.1e} instances, expected at most {LARGEST_SIZE:.0e}: lower them, or set max_size."
            )
        mean = random.normal(random.normal(0, self.beta), 1, self.num_features)
        return random, int(size), mean

    def _concept(self, random: np.random.Generator, mean: float) -> Concept:
        weight = random.normal(mean, 1, (self.num_classes, self.num_features))
        return Concept(weight, random.normal(mean, 1, self.num_classes))


class SyntheticData(FederatedDataModule):
    """Generates Synthetic(alpha, beta) clients, optionally with a share of instances that all clients label alike.

    Client k draws u_k ~ N(0, alpha^2), its concept W_k, b_k ~ N(u_k, 1), B_k ~ N(0, beta^2), its mean
    v_k ~ N(B_k, 1), and instances x ~ N(v_k, diag(j^-1.2)), j = 1..features, labelled argmax(W_k x + b_k).
    An instance whose first feature, the one that varies most within a client, is above a threshold is labelled by one
    concept W, b ~ N(0, 1) of all clients instead. The threshold is the quantile above which a share `shared_fraction`
    of the distribution of all instances lies.

    Args:
        alpha: standard deviation of the means of the clients' concepts.
        beta: standard deviation of the means of the clients' features.
        shared_fraction: share of the instances that all clients label alike, 0 to 1; 0 = the published data.
        num_clients: number of clients.
        num_features: number of features of an instance.
        num_classes: number of classes.
        mean_log_size: mean of the logarithm of a client's number of instances in excess of `min_size`.
        sigma_log_size: standard deviation of that logarithm.
        min_size: smallest number of instances of a client.
        max_size: largest number of instances of a client; null = no limit.
        **kwargs: settings of every data set, see `FederatedDataModule`; `split_seed` also selects the clients.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        shared_fraction: float = 0.0,
        num_clients: int = 30,
        num_features: int = 60,
        num_classes: int = 10,
        mean_log_size: float = 4.0,
        sigma_log_size: float = 2.0,
        min_size: int = 50,
        max_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._clients = SyntheticClients(
            alpha=alpha,
            beta=beta,
            shared_fraction=shared_fraction,
            num_clients=num_clients,
            num_features=num_features,
            num_classes=num_classes,
            mean_log_size=mean_log_size,
            sigma_log_size=sigma_log_size,
            min_size=min_size,
            max_size=max_size,
            seed=self.split_seed,
        )

    def options(self) -> dict[str, Any]:
        """Return all settings of the generator."""
        return asdict(self._clients)

    def class_count(self) -> int:
        """Return the configured number of classes, whether or not each has an instance."""
        return self._clients.num_classes

    def clients(self) -> SyntheticClients:
        """Generate the clients."""
        return self._clients
