"""The Gaussian mechanism on the sum of clients' updates: client-level central differential privacy."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from flow_pl.data.sampler import SamplingName
from flow_pl.engine.client_norms import scaled_weights
from flow_pl.engine.privacy.accounting import Accountant, AccountantName, Ledger, Sampling
from flow_pl.engine.privacy.clipping import Clipping, FixedClipping
from flow_pl.engine.privacy.noise import CLIPPED, UPDATES, secure_noise, seeded_noise
from flow_pl.errors import ConfigurationError, FlowError
from flow_pl.utils.groups import Groups
from flow_pl.utils.validation import given, require_count, require_positive


class PrivacyBudgetError(FlowError):
    """Another round would exceed the privacy budget."""


class GaussianMechanism:
    """Makes every round of training differentially private for each client as a whole (DP-FedAvg).

    From McMahan et al., Learning Differentially Private Recurrent Language Models (ICLR 2018): every client's update
    is clipped as a whole, the updates are summed with equal weights, Gaussian noise is added to the sum, and the sum is
    divided by the expected size of the cohort. Epsilon is computed by dp-accounting. The clients' state and
    metrics measured on clients are not covered.

    The noise multiplier is the standard deviation of the noise / L2 sensitivity of the sum. With Poisson cohorts
    neighbours differ by the presence of one client, and the sensitivity is the clipping norm; with cohorts of a fixed
    size one client is replaced by another, and it is twice the norm.

    Args:
        delta: delta of the guarantee; less than 1 / population is customary.
        epsilon: the budget. Without `noise_multiplier` the noise is calibrated for the rounds of the fit; with it, the
            run stops before the round that would exceed the budget. null = no budget.
        noise_multiplier: standard deviation of the noise / sensitivity; null = calibrated to the budget.
        clipping: how updates are clipped; null = `FixedClipping` to norm 1.
        accountant: "pld" (tighter; needs `data.sampling: poisson`) or "rdp".
        secure: draw the noise from the system's secure generator instead of the seed. Such a run cannot be repeated.
        noise_cohort_size: simulate the noise of cohorts of this size with those of `data.cohort_size`: noise
            and epsilon are those of the larger cohort. The guarantee is that of the simulated deployment, not of this
            run.
        population: number of clients of the simulated deployment; null = those of the data.

    Raises:
        ConfigurationError: a setting is out of its range, or neither epsilon nor noise_multiplier is given.
    """

    samplings: ClassVar[tuple[SamplingName, ...]] = ("poisson", "fixed")
    """The kinds of cohorts for which the guarantee holds."""

    def __init__(
        self,
        delta: float,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        clipping: Clipping | None = None,
        accountant: AccountantName = "pld",
        secure: bool = False,
        noise_cohort_size: int | None = None,
        population: int | None = None,
    ) -> None:
        require_positive(delta=delta, **given(epsilon=epsilon, noise_multiplier=noise_multiplier))
        if delta >= 1:
            raise ConfigurationError(f"delta is {delta}, expected less than 1, such as 1 / the number of clients.")
        if epsilon is None and noise_multiplier is None:
            raise ConfigurationError(
                "epsilon and noise_multiplier of model.privacy are null, expected at least one of them: give the "
                "budget to calibrate the noise, or the noise to have epsilon reported."
            )
        require_count(**given(noise_cohort_size=noise_cohort_size, population=population))
        self.delta = delta
        self.budget = epsilon
        self.clipping = FixedClipping() if clipping is None else clipping
        self.secure = secure
        self.noise_cohort_size = noise_cohort_size
        self.population = population
        self.ledger = Ledger()
        self.epsilon = 0.0
        self.exhausted = False
        self._accountant_name = accountant
        self._given_noise = noise_multiplier
        self._next_epsilon: float | None = None

    def plan(self, sampling: Sampling, rounds: int | None, seed: int, first: bool = True) -> None:
        """Check the settings against a fit, and calibrate the noise.

        Args:
            sampling: how the cohorts are actually drawn.
            rounds: number of rounds of the fit, including those before a checkpoint; None = no limit.
            seed: seed of the noise.
            first: whether this is the first process, which adds the noise.

        Raises:
            ConfigurationError: the settings do not suit the fit.
        """
        if sampling.kind not in self.samplings:
            raise ConfigurationError(
                f"data.sampling is {sampling.kind}, for which {type(self).__name__} gives no guarantee: set it to "
                f"{' or '.join(self.samplings)}."
            )
        self._cohort, self._seed, self._first = sampling.cohort, seed, first
        self._next_epsilon = None  # of an earlier fit, whose noise may have been another
        self._accountant = Accountant(self._accountant_name, self.delta)
        self._accountant.check(sampling)
        population = sampling.population if self.population is None else self.population
        cohort = sampling.cohort if self.noise_cohort_size is None else self.noise_cohort_size
        if cohort * sampling.groups > population:
            within = "" if sampling.groups == 1 else f", divided into {sampling.groups} groups (data.cycle_length)"
            raise ConfigurationError(
                f"cohorts of {cohort} clients cannot be drawn from {population}{within}: set model.privacy.population "
                "to the number of clients of the simulated deployment, or a smaller noise_cohort_size."
            )
        self._sampling = Sampling(sampling.kind, population, cohort, sampling.groups)
        if self._given_noise is not None:
            self.noise_multiplier = self._given_noise
        elif rounds is None or self.budget is None:
            raise ConfigurationError(
                "the noise of model.privacy is calibrated for the rounds of the fit, which are unlimited: set "
                "trainer.max_epochs, or give noise_multiplier, and the run stops at epsilon."
            )
        else:
            self.noise_multiplier = self._accountant.calibrate(self._sampling, rounds, self.budget)
        self._update_multiplier, self._count_deviation = self.clipping.split_noise(
            self.noise_multiplier, sampling.sensitivity, cohort
        )

    @property
    def simulated(self) -> bool:
        """Return whether the guarantee holds for a deployment other than the run."""
        return self.noise_cohort_size is not None or self.population is not None

    def describe(self) -> str:
        """Describe the guarantee in one line."""
        sampling = self._sampling
        simulated = " of a simulated deployment, not of this run" if self.simulated else ""
        groups = f" in {sampling.groups} groups" if sampling.groups > 1 else ""
        return (
            f"differential privacy for whole clients{simulated}: neighbours {sampling.relation}; {sampling.kind} "
            f"cohorts of {sampling.cohort} of {sampling.population} clients{groups}; noise multiplier "
            f"{self.noise_multiplier:.4g}; delta {self.delta:g}; accountant {self._accountant_name}; noise from the "
            f"{'system' if self.secure else 'seed, for experiments only'}"
        )

    def require_budget(self, rounds: int | None) -> None:
        """Account for the ledger, and check that the remaining rounds are within the budget.

        Args:
            rounds: total number of rounds, including those of the ledger; None = one more.

        Raises:
            PrivacyBudgetError: they exceed it.
            ConfigurationError: the ledger's rounds used another sampling scheme.
        """
        self.epsilon = self._accountant.epsilon(self.ledger)
        to_come = 1 if rounds is None else max(rounds - self.ledger.rounds, 0)
        if self.budget is None or not to_come:
            return
        wanted = self._accountant.epsilon(self.ledger.extended(self._sampling, self.noise_multiplier, to_come))
        if wanted > self.budget:
            left = self._accountant.rounds_left(self.ledger, self._sampling, self.noise_multiplier, self.budget)
            raise PrivacyBudgetError(
                f"model.privacy.epsilon is {self.budget:g}, but after {to_come} more rounds it would be {wanted:.4g} "
                f"(now {self.epsilon:.4g} after {self.ledger.rounds} rounds) at delta {self.delta:g}: set "
                f"trainer.max_epochs to {self.ledger.rounds + left} or less, or choose a larger noise_multiplier or "
                "epsilon."
            )

    def clip(self, difference: Groups, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Compute weights for summing a chunk's updates such that each is within the norm.

        Args:
            difference: the clients' updates, by group and name [C, ...].
            weights: for each group, the clients' weights [C]: 1, or 0 for excluded clients.

        Returns:
            The new weights; and the sum over clients of 1/2 for each within the norm, and -1/2 for each other one.
        """
        factors, within = self.clipping.factors(difference)
        counted = next(iter(weights.values()))
        return scaled_weights(weights, factors), ((within.to(counted.dtype) - 0.5) * counted).sum()

    @torch.no_grad()
    def perturb(self, sums: Tensor, within: Tensor) -> None:
        """Add the round's noise in place, in the first process only.

        Args:
            sums: [D] the sum of this process's clipped updates.
            within: count of this process, as returned by `clip`; a scalar.
        """
        if not self._first:
            return
        scale = self._cohort / self._sampling.cohort
        sums.add_(self._draw(len(sums), UPDATES).to(sums.device), alpha=self.noise_deviation)
        if self._count_deviation:
            within.add_(self._draw(1, CLIPPED).to(within.device)[0], alpha=scale * self._count_deviation)

    @property
    def noise_deviation(self) -> float:
        """Return the standard deviation of the noise on the sum of the updates in the next round."""
        scale = self._cohort / self._sampling.cohort
        return scale * self._update_multiplier * self._sampling.sensitivity * self.clipping.norm

    @property
    def denominator(self) -> float:
        """Return the divisor of the sum: the expected cohort size, whoever reported."""
        return float(self._cohort)

    def close_round(self, within: float) -> None:
        """Add a round to the ledger and update the clipping norm.

        Args:
            within: the count, summed over processes, with its noise.
        """
        self.clipping.adapt(within / self._cohort + 0.5)
        self.ledger.add(self._sampling, self.noise_multiplier)
        self.epsilon = self._next_epsilon or self._accountant.epsilon(self.ledger)
        self._next_epsilon = None
        if self.budget is not None:
            more = self.ledger.extended(self._sampling, self.noise_multiplier, 1)
            self._next_epsilon = self._accountant.epsilon(more)
            self.exhausted = self._next_epsilon > self.budget

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger, the privacy spent and the clipping norm, for a checkpoint."""
        return {
            "ledger": self.ledger.state_dict(),
            "norm": self.clipping.norm,
            "epsilon": self.epsilon,
            "delta": self.delta,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the ledger of a checkpoint."""
        self.clipping.resume(state["norm"])
        self.ledger.load_state_dict(state["ledger"])
        self.epsilon = state["epsilon"]
        self._next_epsilon = None

    def _draw(self, size: int, purpose: int) -> Tensor:
        """Draw standard normals [size], different in every round."""
        noise = secure_noise(size) if self.secure else seeded_noise(size, self._seed, self.ledger.rounds, purpose)
        return torch.from_numpy(noise)
