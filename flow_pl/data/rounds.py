"""Rounds as Lightning's count of steps."""

from __future__ import annotations

from lightning.pytorch import Trainer


def count_rounds(trainer: Trainer) -> None:
    """Let what is logged without a step of its own, by callbacks and for every batch, stand at the round.

    Lightning takes the number of batches for that, which are chunks of clients here.

    Args:
        trainer: in a fit.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step  # private, as of Lightning 2.6
