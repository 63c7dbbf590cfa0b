"""Deployed runs with differential privacy."""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")
pytest.importorskip("dp_accounting")

from flow_pl.engine.privacy.accounting import Accountant, Ledger, Sampling
from flow_pl.errors import ConfigurationError
from tests.deploy.grid import run_fit
from tests.deploy.test_nodes_data import node_cohorts

PRIVATE = (
    "--data.init_args.sampling=poisson",
    "--model.loop.init_args.weighting=uniform",
    "--model.privacy=GaussianMechanism",
    "--model.privacy.init_args.delta=1e-3",
    "--model.privacy.init_args.secure=true",
)


def noise(multiplier, norm):
    return (
        f"--model.privacy.init_args.noise_multiplier={multiplier}",
        "--model.privacy.init_args.clipping=FixedClipping",
        f"--model.privacy.init_args.clipping.init_args.norm={norm}",
    )


def test_without_noise_a_private_run_of_all_clients_is_a_plain_one(start, tmp_path, monkeypatch):
    plain = run_fit(start("fedavg", PRIVATE[1]), tmp_path).model.state_dict()
    (tmp_path / "app").rename(tmp_path / "plain_app")
    monkeypatch.setattr("flow_pl.engine.privacy.mechanism.secure_noise", lambda size: np.zeros(size, dtype=np.float32))
    grid = start("fedavg", *PRIVATE, *noise(1.0, 1e3))
    private = run_fit(grid, tmp_path, folder=str(tmp_path / "private"), **{"registered-clients": 3}).model.state_dict()
    for name, tensor in plain.items():
        torch.testing.assert_close(private[name], tensor, rtol=0, atol=1e-5)


def test_epsilon_is_that_of_the_registered_clients(start, tmp_path):
    grid = start("fedavg", *PRIVATE, *noise(2.0, 0.1), "--data.init_args.cohort_size=2")
    cli = run_fit(grid, tmp_path, **{"registered-clients": 1000})
    ledger = Ledger()
    for _ in range(2):
        ledger.add(Sampling("poisson", 1000, 2), 2.0)
    expected = Accountant("pld", 1e-3).epsilon(ledger)
    assert cli.trainer.callback_metrics["privacy/epsilon"].item() == pytest.approx(expected)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["privacy"]["epsilon"] == pytest.approx(expected)


def test_rounds_without_clients_add_noise_and_count(start, tmp_path):
    grid = start("fedavg", *PRIVATE, *noise(2.0, 0.1))
    cli = run_fit(grid, tmp_path, **{"registered-clients": 10**9})
    assert {kind for kind, _, _ in grid.asked} == {"query", "evaluate"}
    assert cli.trainer.callback_metrics["train/clients"] == 0
    assert cli.trainer.callback_metrics["train/update_norm"] > 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert [entry["rounds"] for entry in saved["privacy"]["ledger"]] == [2]


class _KilledError(Exception):
    """In place of a signal that ends the server."""


def test_a_round_whose_model_was_sent_counts_though_no_checkpoint_has_it(start, tmp_path):
    """Killed in the second round, when nodes evaluate its model and only the first one is in a checkpoint."""
    grid = start("fedavg", *PRIVATE, *noise(2.0, 0.1), "--trainer.num_sanity_val_steps=0")
    settings = {"registered-clients": 3}

    def kill(client, kind, round_, reply):
        if kind == "evaluate" and sum(asked == "evaluate" for asked, _, _ in grid.asked) > 3:
            raise _KilledError
        return reply

    grid.spoil, spare = kill, grid.spoil
    with pytest.raises(_KilledError):
        run_fit(grid, tmp_path, **settings)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert [entry["rounds"] for entry in saved["privacy"]["ledger"]] == [1]
    grid.spoil = spare
    cli = run_fit(grid, tmp_path, **settings, **{"ckpt-path": "last"})
    ledger = Ledger()
    ledger.add(Sampling("poisson", 3, 3), 2.0, rounds=3)
    assert cli.trainer.global_step == 2
    assert cli.trainer.callback_metrics["privacy/epsilon"].item() == pytest.approx(
        Accountant("pld", 1e-3).epsilon(ledger)
    )


def test_a_damaged_record_of_rounds_is_refused(start, tmp_path):
    grid = start("fedavg", *PRIVATE, *noise(2.0, 0.1))
    run_fit(grid, tmp_path, **{"registered-clients": 3})
    (tmp_path / "run" / "private_rounds.json").write_text("[{}]")
    with pytest.raises(ConfigurationError, match=r"private_rounds\.json is damaged"):
        run_fit(grid, tmp_path, **{"registered-clients": 3, "ckpt-path": "last"})


@pytest.mark.parametrize("given", [0, 2])
def test_a_private_run_must_know_how_many_clients_may_take_part(start, tmp_path, given):
    grid = start("fedavg", *PRIVATE, *noise(1.0, 1.0))
    with pytest.raises(ConfigurationError, match=rf"registered-clients is {given}, .* at least data.cohort_size \(3\)"):
        run_fit(grid, tmp_path, **{"registered-clients": given})
    assert not grid.asked


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("--data.init_args.sampling=fixed", "data.sampling is fixed"),
        ("--model.privacy.init_args.secure=false", "model.privacy.secure is false"),
        ("--model.privacy.init_args.population=1000", "simulates another deployment"),
    ],
)
def test_what_nodes_could_undo_is_not_deployed(setting, said, start):
    with pytest.raises(ConfigurationError, match=said):
        start("fedavg", *PRIVATE, *noise(1.0, 1.0), setting)


def test_each_connected_client_is_drawn_with_the_registered_probability(monkeypatch):
    drawn = iter(range(1, 1000))
    monkeypatch.setattr(os, "urandom", lambda size: next(drawn).to_bytes(size, "big"))
    cohorts = node_cohorts([0, 1, 2, 5], rounds=2001, sampling="poisson", registered=10)
    share = np.array([[client in cohort for client in (0, 1, 2, 5)] for cohort in cohorts]).mean(0)
    # 2 of 10, whoever is connected; five standard deviations
    np.testing.assert_allclose(share, 0.2, atol=5 * np.sqrt(0.2 * 0.8 / 2000))
    assert [] in cohorts
    again = node_cohorts([0, 1, 2, 5], rounds=101, sampling="poisson", registered=10)
    assert again != cohorts[:100], "cohorts follow from the seed"
