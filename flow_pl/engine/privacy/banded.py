"""Banded matrix factorization: Gaussian noise that later rounds partly take back."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from flow_pl.data.sampler import SamplingName
from flow_pl.engine.privacy.accounting import Sampling
from flow_pl.engine.privacy.clipping import FixedClipping
from flow_pl.engine.privacy.factorization import optimal_coefficients
from flow_pl.engine.privacy.mechanism import GaussianMechanism
from flow_pl.errors import ConfigurationError


class BandedMatrixFactorization(GaussianMechanism):
    """Makes training differentially private by noise that is correlated over rounds (banded matrix factorization).

    From Choquette-Choo et al., (Amplified) Banded Matrix Factorization: A Unified Approach to Private Training (NeurIPS
    2023). The noise of all rounds is C^-1 Z, with Z independent and C a lower triangular Toeplitz matrix with as many
    bands as the clients have groups. The model is the sum of the rounds' updates, and most of the noise of a round is
    taken back in the next ones, so that the error of these sums is smaller. C is the optimal one for the planned
    rounds, computed by jax-privacy.

    The guarantee holds for `data.sampling: cyclic_poisson`: every client is in one of `data.cycle_length` groups, and a
    round draws only from the group whose turn it is. So a client's rounds are at least as far apart as C has bands, and
    the rounds are accounted for as one Poisson sample of a group for each cycle (Theorem 4). With a cycle length of 1
    it is the `GaussianMechanism`.

    The noise multiplier is the standard deviation of Z / clipping norm; the columns of C have norm 1.

    Args:
        delta: delta of the guarantee.
        **settings: other settings of `GaussianMechanism`.

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    samplings: ClassVar[tuple[SamplingName, ...]] = ("cyclic_poisson",)

    def __init__(self, delta: float, **settings: Any) -> None:
        super().__init__(delta, **settings)
        self.coefficients: list[float] = []
        self._earlier: list[Tensor] = []
        self._current: Tensor | None = None
        self._planned: int | None = None

    def plan(self, sampling: Sampling, rounds: int | None, seed: int, first: bool = True) -> None:
        """Check the settings against a fit, calibrate the noise, and factorize; see `GaussianMechanism.plan`."""
        if not isinstance(self.clipping, FixedClipping):
            raise ConfigurationError(
                f"model.privacy.clipping is {type(self.clipping).__name__}, whose noisy share of clients "
                "BandedMatrixFactorization does not account for: set it to FixedClipping."
            )
        if rounds is None:
            raise ConfigurationError(
                "the noise of BandedMatrixFactorization is optimized for the rounds of the fit, which are unlimited: "
                "set trainer.max_epochs."
            )
        super().plan(sampling, rounds, seed, first)
        self._planned = seed
        if first:
            self.coefficients = optimal_coefficients(rounds, min(sampling.groups, rounds))

    def close_round(self, within: float) -> None:
        """Add a round to the ledger, and keep its noise for those that are correlated with it."""
        super().close_round(within)
        if self._current is not None:
            self._earlier = [self._current, *self._earlier][: len(self.coefficients) - 1]
            self._current = None

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger, the coefficients of C and the noise of the last rounds, for a checkpoint."""
        state = {"coefficients": self.coefficients, "noise": self._earlier, "seed": self._planned}
        return {**super().state_dict(), **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the ledger and the noise of a checkpoint; C stays that of the rounds so far.

        Raises:
            ConfigurationError: the noise of the checkpoint's rounds was independent, or another seed divided the
                clients into groups.
        """
        if "coefficients" not in state:
            raise ConfigurationError(
                "the checkpoint was trained with GaussianMechanism, this configuration has BandedMatrixFactorization: "
                "go on as the checkpoint was trained, or start anew."
            )
        if self._planned not in (None, state["seed"]):
            raise ConfigurationError(
                f"the seed is {self._planned}, the checkpoint's {state['seed']}: the clients would be divided into "
                "other groups, and one could come again too soon for the guarantee. Set seed_everything (or data.seed) "
                f"to {state['seed']}."
            )
        super().load_state_dict(state)
        self.coefficients, self._earlier = list(state["coefficients"]), list(state["noise"])

    def _draw(self, size: int, purpose: int) -> Tensor:
        """Draw the noise of a round [size]: a row of C^-1 Z, by forward substitution."""
        diagonal, *below = self.coefficients
        noise = super()._draw(size, purpose)
        for coefficient, earlier in zip(below, self._earlier, strict=False):
            noise.sub_(earlier, alpha=coefficient)
        self._current = noise.div_(diagonal)
        return self._current
