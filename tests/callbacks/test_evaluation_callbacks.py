"""Callbacks that measure clients, driven by a real Trainer."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from flow_pl.callbacks import GeneralizedAccuracy, PersonalizationGain, PersonalizedAccuracy, RoutingStatistics
from flow_pl.tasks import NextToken
from tests.callbacks.fakes import FakeData, FakeModule, evaluation_chunk, make_trainer

SEEN = [evaluation_chunk([(4, 2, 3, 1, 4, 1, 2), (2, 0, 0, 0, 0, 2, 0)], blocks=2), evaluation_chunk([], blocks=2)]
NEW = [evaluation_chunk([(0, 0, 0, 0, 0, 0, 0), (2, 2, 1, 1, 2, 0, 0)], blocks=2)]
BLOCKS = ("conv1", "head")


def callbacks() -> list[object]:
    return [GeneralizedAccuracy(), PersonalizedAccuracy(), PersonalizationGain(), RoutingStatistics()]


def floats(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items()}


def seen_figures(prefix: str) -> dict[str, object]:
    """Of SEEN: client accuracies 1/2 -> 3/4 and 0 -> 0; w_g right on 2 of 6, personalized 3, one of both 4."""
    figures = {
        "generalized_accuracy": 2 / 6,
        "generalized_accuracy_client_mean": 1 / 4,
        "generalized_accuracy_p10": 0.05,
        "generalized_accuracy_p50": 0.25,
        "generalized_accuracy_p90": 0.45,
        "generalized_accuracy_worst_decile": 0.0,
        "generalized_accuracy_client_std": 1 / 4,
        "generalized_accuracy_client_gini": 1 / 2,
        "generalized_loss": 2.0,
        "personalized_accuracy": 3 / 6,
        "personalized_accuracy_client_mean": 3 / 8,
        "personalized_accuracy_p10": 0.075,
        "personalized_accuracy_p50": 0.375,
        "personalized_accuracy_p90": 0.675,
        "personalized_accuracy_worst_decile": 0.0,
        "personalized_accuracy_client_std": 3 / 8,
        "personalized_accuracy_client_gini": 1 / 2,
        "personalized_loss": 1.0,
        "gain": 1 / 6,
        "gain_client_mean": 1 / 8,
        "clients_helped": 1 / 2,
        "clients_unchanged": 1 / 2,
        "clients_harmed": 0.0,
        "examples_both_right": 1 / 6,
        "examples_only_generalized": 1 / 6,
        "examples_only_personalized": 2 / 6,
        "examples_neither": 2 / 6,
        "global_or_local_accuracy": 4 / 6,
        "best_mixture_accuracy": 3 / 6,
        "gain_over_mixture": 0.0,
        "routed_local": 5 / 12,
        "routed_local_p10": 3 / 8 + 1 / 80,
        "routed_local_p50": 7 / 16,
        "routed_local_p90": 1 / 2 - 1 / 80,
        "routed_local/conv1": 3 / 6,
        "routed_local/head": 2 / 6,
    }
    return {f"{prefix}{name}": pytest.approx(value) for name, value in figures.items()}


def test_validation_logs_every_figure() -> None:
    trainer = make_trainer(*callbacks())
    returned = trainer.validate(FakeModule(BLOCKS), datamodule=FakeData(SEEN), verbose=False)
    assert returned == [seen_figures("val/")]
    assert floats(trainer.callback_metrics) == seen_figures("val/")


def test_each_test_population_has_its_figures() -> None:
    trainer = make_trainer(*callbacks())
    trainer.test(FakeModule(BLOCKS), datamodule=FakeData([], seen=SEEN, new=NEW), verbose=False)
    metrics = floats(trainer.callback_metrics)
    assert {n: v for n, v in metrics.items() if n.startswith("test/seen/")} == seen_figures("test/seen/")
    assert metrics["test/new/generalized_accuracy"] == 1.0
    assert metrics["test/new/gain"] == -0.5
    assert metrics["test/new/gain_over_mixture"] == -0.5
    assert metrics["test/new/clients_harmed"] == 1.0
    assert len(metrics) == 2 * len(seen_figures(""))


def test_a_method_without_routes_logs_none() -> None:
    trainer = make_trainer(*callbacks())
    trainer.validate(FakeModule(), datamodule=FakeData(SEEN), verbose=False)
    assert not [name for name in trainer.callback_metrics if "routed" in name]


def test_a_second_accuracy_has_its_own_count() -> None:
    """Clients: 1 -> 2 of 3, 0 -> 0 of 2, and one whose only targets are special, which counts in the headline alone."""
    clients = [(4, 2, 3, 1, 4), (2, 0, 0, 0, 0), (1, 1, 1, 1, 1)]
    chunk = evaluation_chunk(clients, subset=[(3, 1, 2), (2, 0, 0), (0, 0, 0)])
    trainer = make_trainer(*callbacks())
    data = FakeData([chunk, evaluation_chunk([], subset=[])])
    trainer.validate(FakeModule(objective=NextToken()), datamodule=data, verbose=False)
    metrics = floats(trainer.callback_metrics)
    assert metrics["val/generalized_accuracy"] == pytest.approx(3 / 7)
    assert {name: value for name, value in metrics.items() if "without" in name} == {
        f"val/{name}": pytest.approx(value)
        for name, value in {
            "generalized_accuracy_without_oov_eos": 1 / 5,
            "generalized_accuracy_without_oov_eos_client_mean": 1 / 6,
            "generalized_accuracy_without_oov_eos_p10": 1 / 30,
            "generalized_accuracy_without_oov_eos_p50": 1 / 6,
            "generalized_accuracy_without_oov_eos_p90": 3 / 10,
            "generalized_accuracy_without_oov_eos_worst_decile": 0.0,
            "generalized_accuracy_without_oov_eos_client_std": 1 / 6,
            "generalized_accuracy_without_oov_eos_client_gini": 1 / 2,
            "personalized_accuracy_without_oov_eos": 2 / 5,
            "personalized_accuracy_without_oov_eos_client_mean": 1 / 3,
            "personalized_accuracy_without_oov_eos_p10": 2 / 30,
            "personalized_accuracy_without_oov_eos_p50": 1 / 3,
            "personalized_accuracy_without_oov_eos_p90": 6 / 10,
            "personalized_accuracy_without_oov_eos_worst_decile": 0.0,
            "personalized_accuracy_without_oov_eos_client_std": 1 / 3,
            "personalized_accuracy_without_oov_eos_client_gini": 1 / 2,
        }.items()
    }


def test_every_round_starts_from_nothing_and_monitors_see_it(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/personalized_accuracy", mode="max")
    stop = EarlyStopping("val/gain", mode="max", patience=1)
    trainer = make_trainer(*callbacks(), best, stop, enable_checkpointing=True, max_epochs=5)
    trainer.fit(FakeModule(BLOCKS), datamodule=FakeData(SEEN))
    assert best.best_model_score == pytest.approx(0.5)
    assert trainer.current_epoch == 2  # no better in the second round
    assert floats(trainer.callback_metrics).items() >= seen_figures("val/").items()


def test_nothing_is_logged_in_the_sanity_check() -> None:
    trainer = make_trainer(*callbacks(), num_sanity_val_steps=2, max_epochs=1, limit_train_batches=0)
    trainer.fit(FakeModule(BLOCKS), datamodule=FakeData(SEEN))
    assert not [name for name in trainer.callback_metrics if name.startswith("val/")]
