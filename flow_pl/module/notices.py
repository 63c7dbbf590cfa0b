"""Warn of clients that were left out of a round, and of rounds without clients."""

from __future__ import annotations

import warnings

from lightning.pytorch import Trainer

from flow_pl.engine.server_round import ServerRound


class RejectedClientWarning(UserWarning):
    """A client was left out of a round."""


class EmptyRoundWarning(UserWarning):
    """A round had no client to train."""


def warn_of_empty_round(trainer: Trainer) -> None:
    """Warn of a round without clients, with the reason."""
    if not trainer.is_global_zero:
        return
    absent = trainer.train_dataloader.sampler.absent  # type: ignore[union-attr]
    reasons = ", ".join(f"{name}: {count}" for name, count in absent.items() if count)
    warnings.warn(
        f"round {trainer.current_epoch}: none of the clients has been trained{f' ({reasons})' if reasons else ''}; "
        "the round has no loss, and clients send nothing. If that happens often, raise data.cohort_size or "
        "data.deadline, or lower data.dropout.",
        EmptyRoundWarning,
        stacklevel=2,
    )


def warn_of_empty_rounds(trainer: Trainer, count: int) -> None:
    """Warn at the end of a fit of its rounds without clients, if there are any."""
    if count and trainer.is_global_zero:
        warnings.warn(
            f"{count} of {trainer.global_step} rounds had no client to train.", EmptyRoundWarning, stacklevel=3
        )


def warn_of_rejected(trainer: Trainer, round_: ServerRound) -> None:
    """Warn of the clients of this process that were left out of a round, with the reasons."""
    if not round_.any_rejected:
        return
    data = trainer.datamodule  # type: ignore[attr-defined]
    for client, reason in round_.rejected():
        warnings.warn(
            f"round {trainer.current_epoch}: client '{data.client_name(client)}' is left out: {reason}.",
            RejectedClientWarning,
            stacklevel=2,
        )
