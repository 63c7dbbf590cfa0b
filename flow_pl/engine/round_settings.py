"""Check the settings of the server's round against a run, before anything is trained."""

from __future__ import annotations

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from flow_pl.data import FederatedDataModule
from flow_pl.data.federation import Ints
from flow_pl.engine.aggregation import Aggregation, CohortAggregation, Mean
from flow_pl.engine.attacks import Attack
from flow_pl.engine.compression import Compression
from flow_pl.engine.privacy import GaussianMechanism, Sampling, check_private
from flow_pl.engine.server_round import sent_parameters
from flow_pl.methods.base import Method


def planned_rounds(trainer: Trainer) -> int | None:
    """Return the largest number of rounds of a fit, including those before its checkpoint; None = no limit."""
    limits = (trainer.max_epochs, trainer.max_steps)
    return min((limit for limit in limits if limit is not None and limit >= 0), default=None)


def choose_attackers(data: FederatedDataModule, attack: Attack | None) -> Ints:
    """Choose the clients that attack; return their indices, none without an attack."""
    if attack is None:
        return np.zeros(0, dtype=np.int64)
    return attack.choose(data.federation.seen, len(data.federation.store), data.run_seed)


def prepare_rounds(
    trainer: Trainer,
    data: FederatedDataModule,
    method: Method,
    weighting: str,
    aggregation: Aggregation,
    privacy: GaussianMechanism | None,
    attack: Attack | None,
    compression: Compression | None,
) -> None:
    """Check the settings of the server's round against a fit, and report their cost and guarantee.

    Args:
        trainer: trainer of the fit.
        data: data module, set up.
        method: the algorithm, with lazy modules initialized.
        weighting: weighting of the clients in the server's mean.
        aggregation: how the updates are combined.
        privacy: makes the mean differentially private; None for a plain mean.
        attack: the attack, with its attackers chosen; None if there is none.
        compression: compression of the updates; None for none.

    Raises:
        ConfigurationError: the settings do not suit the fit.
    """
    attackers = 0 if attack is None else attack.expected(data.cohort_size)
    aggregation.check(method, weighting, data.cohort_size, attackers)
    if isinstance(aggregation, CohortAggregation):
        numbers = sum(p.numel() for group in sent_parameters(method).values() for p in group.values())
        held = 4 * numbers * data.cohort_size
        rank_zero_info(
            f"{type(aggregation).__name__} holds the updates of a cohort on the {aggregation.storage}: "
            f"{data.cohort_size} clients x {numbers} numbers = {held / 1e6:.1f} MB over all processes"
        )
    if compression is not None:
        compression.check(method)
    if privacy is not None:
        check_private(method, weighting, mean=type(aggregation) is Mean, precision=str(trainer.precision))
        sampling = Sampling(data.sampling, data.population_size, data.cohort_size, data.cycle_length)
        privacy.plan(sampling, planned_rounds(trainer), data.run_seed, trainer.is_global_zero)
        rank_zero_info(privacy.describe())
