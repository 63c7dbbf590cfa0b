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
        reasons = [*_untrained(trainer), *_untested(trainer)]
        if checkpoint == "best":
            reasons += _unvalidated(trainer, communicates(each["model"]["method"]["class_path"]))
        for reason in reasons:
            raise ConfigurationError(f"{method} cannot be compared: {reason}.")


def check_validated(settings: Mapping[str, Settings]) -> None:
    """Check that every run will be trained and validated.

    Args:
        settings: settings of each method.

    Raises:
        ConfigurationError: a run would end without a validation.
    """
    for method, each in settings.items():
        trainer = each["trainer"]
        reasons = [*_untrained(trainer)]
        if trainer.get("limit_val_batches") == 0:
            reasons.append(_nothing(trainer, "limit_val_batches", "validated"))
        if not planned_rounds(trainer):
            reasons.append(
                f"trainer.max_epochs is {trainer['max_epochs']}, expected the number of rounds of each run, 1 or more: "
                "add e.g. --trainer.max_epochs 30"
            )
        for reason in reasons:
            raise ConfigurationError(f"{method} cannot be tuned: {reason}.")


def _untrained(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a run would not be trained, or leave no checkpoint to resume from."""
    for name, reason in FORBIDDEN.items():
        if trainer.get(name):
            yield f"trainer.{name} is {trainer[name]}, and {reason}"
    if trainer.get("limit_train_batches") == 0:
        yield _nothing(trainer, "limit_train_batches", "trained")


def _untested(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a run would have no checkpoint or no test."""
    if trainer.get("enable_checkpointing") is False:
        yield "trainer.enable_checkpointing is false, but a checkpoint is tested: leave the option out"
    if trainer.get("limit_test_batches") == 0:
        yield _nothing(trainer, "limit_test_batches", "tested")
    if planned_rounds(trainer) == 0:
        yield "it has 0 rounds, so there is no checkpoint to test: set trainer.max_epochs to 1 or more"


def _nothing(trainer: Mapping[str, Any], name: str, done: str) -> str:
    return f"trainer.{name} is {trainer[name]}, so nothing would be {done}: expected more than 0"


def _unvalidated(trainer: Mapping[str, Any], in_rounds: bool) -> Iterator[str]:
    """Yield why no round would be validated, so that none is the best."""
    remedy = "--checkpoint best needs a round that was validated"
    if trainer.get("limit_val_batches") == 0:
        yield f"trainer.limit_val_batches is {trainer['limit_val_batches']}, but {remedy}: leave one of them out"
    rounds, interval = planned_rounds(trainer), trainer.get("check_val_every_n_epoch") or 1
    if in_rounds and rounds is not None and 0 < rounds < interval:
        few = f"{rounds} round{'s' * (rounds > 1)} with a validation every {interval}"
        yield (
            f"it has {few} (trainer.check_val_every_n_epoch), but {remedy}: set it to {rounds} or less, or leave the "
            "option out"
        )


def planned_rounds(trainer: Mapping[str, Any]) -> int | None:
    """Return the largest number of rounds; None if there is no limit."""
    limits = [trainer.get("max_epochs"), trainer.get("max_steps")]
    return min((limit for limit in limits if limit is not None and limit >= 0), default=None)
