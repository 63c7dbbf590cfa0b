"""Account for privacy by `dp-accounting`: the noise for a budget, the epsilon of a ledger, and the remaining rounds."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flow_pl.data.sampler import SamplingName
from flow_pl.errors import ConfigurationError
from flow_pl.utils.optional import import_optional
from flow_pl.utils.validation import require_choice

AccountantName = Literal["pld", "rdp"]

DISCRETIZATION = 1e-3
"""Grid width of the privacy losses. A finer grid lowers epsilon in its fourth digit, at ten times the cost a round."""

MOST_ROUNDS = 1 << 24
"""Largest number of rounds that `Accountant.rounds_left` considers."""

NOISE_TOLERANCE = 1e-3
"""Tolerance of a calibrated noise multiplier; the calibration errs towards more noise."""


@dataclass(frozen=True)
class Sampling:
    """How the cohort of a round is drawn.

    Attributes:
        kind: "poisson", each client independently with probability cohort / population; "fixed", a cohort of this size
            without replacement; "cyclic_poisson", of every client of one group in turn, independently with probability
            cohort * groups / population.
        population: number of clients to draw from.
        cohort: size of the cohort, or its expectation.
        groups: number of groups into which the clients are divided at random, for "cyclic_poisson".
    """

    kind: SamplingName
    population: int
    cohort: int
    groups: int = 1

    @property
    def relation(self) -> str:
        """Return the neighbouring relation, in words."""
        return "replace one client" if self.kind == "fixed" else "add or remove one client"

    @property
    def sensitivity(self) -> float:
        """Return how far one client moves the sum of updates, in units of the clipping norm."""
        return 2.0 if self.kind == "fixed" else 1.0


@dataclass(frozen=True)
class Entry:
    """Consecutive rounds with the same sampling and noise.

    Attributes:
        sampling: sampling of their cohorts.
        noise_multiplier: standard deviation of the noise / L2 sensitivity of the sum.
        rounds: number of rounds.
    """

    sampling: Sampling
    noise_multiplier: float
    rounds: int


class Ledger:
    """Records the private rounds so far, in order."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    @property
    def rounds(self) -> int:
        """Return the number of rounds."""
        return sum(entry.rounds for entry in self.entries)

    def add(self, sampling: Sampling, noise_multiplier: float, rounds: int = 1) -> None:
        """Record rounds."""
        last = self.entries[-1] if self.entries else None
        if last is not None and (last.sampling, last.noise_multiplier) == (sampling, noise_multiplier):
            self.entries[-1] = Entry(sampling, noise_multiplier, last.rounds + rounds)
        else:
            self.entries.append(Entry(sampling, noise_multiplier, rounds))

    def extended(self, sampling: Sampling, noise_multiplier: float, rounds: int) -> Ledger:
        """Return a copy with more rounds."""
        other = Ledger()
        other.entries = list(self.entries)
        if rounds:
            other.add(sampling, noise_multiplier, rounds)
        return other

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the entries as plain types, for a checkpoint."""
        return [asdict(entry) for entry in self.entries]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restore the entries of a checkpoint."""
        self.entries = [Entry(**{**entry, "sampling": Sampling(**entry["sampling"])}) for entry in state]


class Accountant:
    """Computes the epsilon of a ledger's rounds.

    Args:
        name: "pld", privacy loss distributions (Doroshenko et al., 2022; tightest, not for cohorts of a fixed size), or
            "rdp", Renyi differential privacy (Mironov, 2017).
        delta: delta of the guarantee.

    Raises:
        ConfigurationError: there is no such accountant, or dp-accounting is not installed.
    """

    def __init__(self, name: AccountantName, delta: float) -> None:
        require_choice(("pld", "rdp"), accountant=name)
        self.name = name
        self.delta = delta
        self._dp = import_optional("dp_accounting", "privacy", "model.privacy")
        self._module = import_optional(f"dp_accounting.{name}", "privacy", "model.privacy")
        logging.getLogger("absl").addFilter(_is_news)

    def check(self, sampling: Sampling) -> None:
        """Refuse cohorts that the accountant does not cover.

        Raises:
            ConfigurationError: the cohorts have a fixed size, and the accountant is "pld".
        """
        if sampling.kind == "fixed" and self.name == "pld":
            raise ConfigurationError(
                "model.privacy.accountant is pld and data.sampling fixed, which it does not cover: set data.sampling "
                "to poisson, or the accountant to rdp, whose epsilon is larger."
            )

    def epsilon(self, ledger: Ledger) -> float:
        """Compute epsilon of all rounds of a ledger at this delta; 0 if there are none.

        Raises:
            ConfigurationError: cohorts are drawn in several ways, or the noise changes between rounds in which it is
                correlated, which no accountant covers.
        """
        if not ledger.entries:
            return 0.0
        kinds = sorted({entry.sampling.kind for entry in ledger.entries})
        if len(kinds) > 1:
            raise ConfigurationError(
                "the checkpoint's rounds and the coming ones draw their cohorts differently (data.sampling "
                f"{' and '.join(kinds)}), which no accountant covers together: continue with data.sampling "
                f"{ledger.entries[0].sampling.kind}."
            )
        first = ledger.entries[0]
        if first.sampling.kind == "cyclic_poisson" and len(ledger.entries) > 1:
            raise ConfigurationError(
                "the coming rounds have another noise multiplier, cohort, population or cycle_length than the "
                f"checkpoint's, whose noise theirs would be correlated with: set model.privacy.noise_multiplier to "
                f"{first.noise_multiplier!r}, and leave cohorts as they were ({first.sampling.cohort} of "
                f"{first.sampling.population} clients, cycle_length {first.sampling.groups})."
            )
        accountant = self._fresh(first.sampling)
        for entry in ledger.entries:
            accountant.compose(self._event(entry.sampling, entry.noise_multiplier, entry.rounds))
        return float(accountant.get_epsilon(self.delta))

    def calibrate(self, sampling: Sampling, rounds: int, epsilon: float) -> float:
        """Find the smallest noise multiplier with which a number of rounds stays within epsilon.

        Raises:
            ConfigurationError: no noise is found.
        """
        try:
            noise = self._dp.calibrate_dp_mechanism(
                lambda: self._fresh(sampling),
                lambda noise: self._event(sampling, noise, rounds),
                epsilon,
                self.delta,
                self._dp.LowerEndpointAndGuess(0.1, 1.0),
                tol=NOISE_TOLERANCE,
            )
        except Exception as error:  # the search may fail in any way at the ends of its range
            raise ConfigurationError(
                f"there is no noise for model.privacy.epsilon {epsilon} at delta {self.delta} over {rounds} rounds "
                f"({type(error).__name__}: {error}): expected an epsilon between about 0.1 and 100; choose "
                "another one, or give noise_multiplier."
            ) from error
        return float(noise)

    def rounds_left(self, ledger: Ledger, sampling: Sampling, noise_multiplier: float, epsilon: float) -> int:
        """Return how many more rounds stay within epsilon, at most `MOST_ROUNDS`."""

        def within(rounds: int) -> bool:
            return self.epsilon(ledger.extended(sampling, noise_multiplier, rounds)) <= epsilon

        if not within(1):
            return 0
        low, high = 1, 2
        while high <= MOST_ROUNDS and within(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(middle) else (low, middle)
        return low

    def _fresh(self, sampling: Sampling) -> Any:
        relations = self._dp.NeighboringRelation
        relation = relations.REPLACE_ONE if sampling.kind == "fixed" else relations.ADD_OR_REMOVE_ONE
        if self.name == "pld":
            return self._module.PLDAccountant(relation, value_discretization_interval=DISCRETIZATION)
        return self._module.RdpAccountant(neighboring_relation=relation)

    def _event(self, sampling: Sampling, noise_multiplier: float, rounds: int) -> Any:
        """Create the event of rounds; for any relation, accountants take the noise in units of the sensitivity.

        A cycle over all groups costs as much as one round of a Poisson sample of a group, also if the noise is
        correlated over as many rounds as there are groups: Choquette-Choo et al., (Amplified) Banded Matrix
        Factorization (NeurIPS 2023), Theorem 4.
        """
        gaussian = self._dp.GaussianDpEvent(noise_multiplier)
        if sampling.kind == "fixed":
            event = self._dp.SampledWithoutReplacementDpEvent(sampling.population, sampling.cohort, gaussian)
        else:
            rate = sampling.cohort * sampling.groups / sampling.population
            event = self._dp.PoissonSampledDpEvent(rate, gaussian)
        return self._dp.SelfComposedDpEvent(event, math.ceil(rounds / sampling.groups))


def _is_news(record: logging.LogRecord) -> bool:
    """Drop the RDP accountant's messages on orders that it excludes in every round: the others still bound epsilon."""
    return "Excluding this order" not in record.getMessage()
