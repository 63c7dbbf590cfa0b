"""Clip clients' whole updates to a norm that is fixed or follows a quantile."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flow_pl.engine.client_norms import group_norms, shrink_factors
from flow_pl.errors import ConfigurationError
from flow_pl.utils.groups import Groups
from flow_pl.utils.validation import given, require_positive


class Clipping(ABC):
    """Clips a client's update before it is summed; a base class.

    Attributes:
        norm: bound on the L2 norm of a client's whole update in the next round.
    """

    norm: float

    @abstractmethod
    def factors(self, difference: Groups) -> tuple[Tensor, Tensor]:
        """Compute factors that bring the clients' updates within the norm.

        Args:
            difference: the clients' updates, by group and name [C, ...].

        Returns:
            Factors of at most 1, [C] or [groups, C]; and [C] bool, which clients were within the norm before.
        """

    def split_noise(self, noise_multiplier: float, sensitivity: float, cohort: int) -> tuple[float, float]:
        """Divide a round's noise between the updates and the number of clients within the norm.

        Args:
            noise_multiplier: noise multiplier of the whole round: standard deviation / sensitivity.
            sensitivity: how far one client moves a sum of vectors of norm 1 (1 or 2).
            cohort: expected number of clients.

        Returns:
            The noise multiplier of the updates; and the standard deviation of the noise on the number of clients
            within the norm, 0 if that number is not used.
        """
        return noise_multiplier, 0.0

    def adapt(self, within: float) -> None:  # noqa: B027 (a fixed norm stays)
        """Adapt the norm to the noisy share of the expected cohort that was within it."""

    def resume(self, norm: float) -> None:  # noqa: B027 (a fixed norm is that of the settings)
        """Continue with the norm of a checkpoint."""


class FixedClipping(Clipping):
    """Clips to a constant norm.

    Args:
        norm: bound on the L2 norm of a client's whole update.
        per_group: clip each of the G shared groups (Flow: w_g and the router) separately, to norm / sqrt(G), instead of
            together (McMahan et al., Learning Differentially Private Recurrent Language Models, ICLR 2018, section 3).
            The bound on the whole update is the same, and so are noise and epsilon.

    Raises:
        ConfigurationError: the norm is not positive.
    """

    def __init__(self, norm: float = 1.0, per_group: bool = False) -> None:
        require_positive(norm=norm)
        self.norm = norm
        self.per_group = per_group

    def factors(self, difference: Groups) -> tuple[Tensor, Tensor]:
        """See `Clipping.factors`."""
        norms = group_norms(difference)
        if self.per_group:
            factors = shrink_factors(norms, self.norm / math.sqrt(len(norms)))
            return factors, (factors == 1).all(0)
        factors = shrink_factors(torch.linalg.vector_norm(norms, dim=0), self.norm)
        return factors, factors == 1


class AdaptiveClipping(Clipping):
    """Clips all shared groups together, to a norm that follows a quantile of the clients' norms.

    From Andrew et al., Differentially Private Learning with Adaptive Clipping (NeurIPS 2021), Algorithm 1: after each
    round the norm is multiplied by exp(-learning_rate * (share within it - quantile)). The share is noisy too, and the
    updates get so much more noise that the round as a whole has the noise multiplier that is accounted for.

    Args:
        initial_norm: bound on the L2 norm in the first round.
        quantile: target share of the clients within the norm.
        learning_rate: learning rate of the logarithm of the norm.
        count_noise: standard deviation of the noise on the number of clients within the norm; null = a twentieth of
            the cohort, as in the paper.

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    def __init__(
        self,
        initial_norm: float = 0.1,
        quantile: float = 0.5,
        learning_rate: float = 0.2,
        count_noise: float | None = None,
    ) -> None:
        require_positive(
            initial_norm=initial_norm, quantile=quantile, learning_rate=learning_rate, **given(count_noise=count_noise)
        )
        if quantile >= 1:
            raise ConfigurationError(f"quantile is {quantile}, expected a share less than 1, such as 0.5.")
        self.norm = initial_norm
        self.quantile = quantile
        self.learning_rate = learning_rate
        self.count_noise = count_noise

    def factors(self, difference: Groups) -> tuple[Tensor, Tensor]:
        """See `Clipping.factors`."""
        factors = shrink_factors(torch.linalg.vector_norm(group_norms(difference), dim=0), self.norm)
        return factors, factors == 1

    def split_noise(self, noise_multiplier: float, sensitivity: float, cohort: int) -> tuple[float, float]:
        """Divide the noise by Theorem 1 of the paper; see `Clipping.split_noise`.

        Raises:
            ConfigurationError: the noise on the number leaves no budget for the updates.
        """
        deviation = cohort / 20 if self.count_noise is None else self.count_noise
        # a client counts as 1/2 or -1/2, so that the number's sensitivity is half of the updates' at norm 1
        count_multiplier = deviation / (sensitivity / 2)
        if count_multiplier <= noise_multiplier:
            raise ConfigurationError(
                f"count_noise is {deviation:g}, expected more than {noise_multiplier * sensitivity / 2:g} at a noise "
                f"multiplier of {noise_multiplier:.4g}: the number of clients within the norm would take the whole "
                "budget; set a larger count_noise (its default is a twentieth of the cohort), or sample more clients."
            )
        return (noise_multiplier**-2 - count_multiplier**-2) ** -0.5, deviation

    def adapt(self, within: float) -> None:
        """See `Clipping.adapt`."""
        self.norm *= math.exp(-self.learning_rate * (within - self.quantile))

    def resume(self, norm: float) -> None:
        """See `Clipping.resume`."""
        self.norm = norm
