"""Make Lightning count rounds as steps."""

from __future__ import annotations

from lightning.pytorch import Trainer


def count_rounds(trainer: Trainer) -> None:
    """Make Lightning log values without a step of their own, by callbacks and for every batch, at the round.

    Lightning would use the number of batches, which are chunks of clients here.

    Args:
        trainer: trainer of the fit.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step  # private, as of Lightning 2.6
