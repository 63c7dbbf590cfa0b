"""Refuse settings with which a run would train, but have no checkpoint to test or no test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flow_pl.compare.settings import Settings, communicates
from flow_pl.errors import ConfigurationError

FORBIDDEN = {
    "fast_dev_run": "a trial writes no checkpoint: for a short comparison, set trainer.max_epochs to 1",
    "barebones": "it writes no checkpoint: leave it out",
}
"""Settings of the trainer that must be off, and why."""


def check_testable(settings: Mapping[str, Settings], checkpoint: str) -> None:
    """Check that every run will write the checkpoint that is to be tested, and test it.

    Args:
        settings: settings of each method.
        checkpoint: the checkpoint to test, "last" or "best".

    Raises:
        ConfigurationError: a run would end without that checkpoint or without a test.
    """
    for method, each in settings.items():
        trainer = each["trainer"]
        reasons = [*_reasons(trainer)]
        if checkpoint == "best":
            reasons += _unvalidated(trainer, communicates(each["model"]["method"]["class_path"]))
        for reason in reasons:
            raise ConfigurationError(f"{method} cannot be compared: {reason}.")


def _reasons(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a run would have no checkpoint or no test."""
    for name, reason in FORBIDDEN.items():
        if trainer.get(name):
            yield f"trainer.{name} is {trainer[name]}, and {reason}"
    if trainer.get("enable_checkpointing") is False:
        yield "trainer.enable_checkpointing is false, but a checkpoint is tested: leave the option out"
    for name, done in (("limit_test_batches", "tested"), ("limit_train_batches", "trained")):
        if trainer.get(name) == 0:
            yield f"trainer.{name} is {trainer[name]}, so nothing would be {done}: expected more than 0"
    if _rounds(trainer) == 0:
        yield "it has 0 rounds, so there is no checkpoint to test: set trainer.max_epochs to 1 or more"


def _unvalidated(trainer: Mapping[str, Any], in_rounds: bool) -> Iterator[str]:
    """Yield why no round would be validated, so that none is the best."""
    remedy = "--checkpoint best needs a round that was validated"
    if trainer.get("limit_val_batches") == 0:
        yield f"trainer.limit_val_batches is {trainer['limit_val_batches']}, but {remedy}: leave one of them out"
    rounds, interval = _rounds(trainer), trainer.get("check_val_every_n_epoch") or 1
    if in_rounds and rounds is not None and 0 < rounds < interval:
        few = f"{rounds} round{'s' * (rounds > 1)} with a validation every {interval}"
        yield (
            f"it has {few} (trainer.check_val_every_n_epoch), but {remedy}: set it to {rounds} or less, or leave the "
            "option out"
        )


def _rounds(trainer: Mapping[str, Any]) -> int | None:
    """Return the largest number of rounds; None if there is no limit."""
    limits = [trainer.get("max_epochs"), trainer.get("max_steps")]
    return min((limit for limit in limits if limit is not None and limit >= 0), default=None)
