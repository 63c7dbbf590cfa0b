"""Banded matrix factorization: noise, accounting, coefficients, checkpoints and refusals."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from flow_pl.engine.privacy import (
    Accountant,
    AdaptiveClipping,
    BandedMatrixFactorization,
    FixedClipping,
    GaussianMechanism,
    Ledger,
    PrivacyBudgetError,
    Sampling,
)
from flow_pl.engine.privacy import banded as module_of_noise
from flow_pl.engine.privacy.factorization import optimal_coefficients
from flow_pl.engine.privacy.noise import seeded_noise
from flow_pl.errors import ConfigurationError
from tests.engine.test_privacy import has_deviation
from tests.engine.test_round_settings import fitted, module, parameters

dp = pytest.importorskip("dp_accounting")
from scipy import optimize  # noqa: E402

CYCLIC = Sampling("cyclic_poisson", 120, 10, 3)
POISSON = Sampling("poisson", 120, 10)
COEFFICIENTS = [0.8, 0.5, math.sqrt(0.11)]
needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("jax_privacy") is None, reason="jax-privacy is not installed (extra matrix-factorization)"
)


@pytest.fixture
def known(monkeypatch):
    """Replace the optimal coefficients, which only jax-privacy computes, by known ones of norm 1."""

    def coefficients(rounds, bands):
        return COEFFICIENTS if bands > 1 else [1.0]

    monkeypatch.setattr(module_of_noise, "optimal_coefficients", coefficients)


def mechanism(sampling=CYCLIC, rounds=8, cls=BandedMatrixFactorization, seed=7, **settings):
    settings = {"noise_multiplier": 1.5, "clipping": FixedClipping(0.5), "accountant": "rdp", **settings}
    made = cls(1e-4, **settings)
    made.plan(sampling, rounds, seed)
    return made


def noise(made, rounds, size=5):
    """Run rounds without clients; return their noise [rounds, size]."""
    drawn = []
    for _ in range(rounds):
        sums = torch.zeros(size)
        made.perturb(sums, torch.zeros(()))
        made.close_round(0.0)
        drawn.append(sums)
    return torch.stack(drawn)


def dense(coefficients, rounds):
    """Return C [rounds, rounds]."""
    return sum(c * np.eye(rounds, k=-lag) for lag, c in enumerate(coefficients))


def test_the_noise_is_that_of_the_dense_matrix(known):
    """C^-1 Z for independent Z, in units of noise multiplier x clipping norm."""
    independent = np.stack([seeded_noise(5, 7, round_, 0) for round_ in range(8)])
    expected = 1.5 * 0.5 * np.linalg.solve(dense(COEFFICIENTS, 8), independent)
    np.testing.assert_allclose(noise(mechanism(), 8).numpy(), expected, atol=1e-5)


def test_a_round_that_is_not_closed_draws_the_same_noise_again(known):
    made = mechanism()
    noise(made, 2)
    sums = torch.zeros(2, 5)
    for each in sums:
        made.perturb(each, torch.zeros(()))
    assert torch.equal(sums[0], sums[1])
    assert sums[0].abs().min() > 0


@pytest.mark.parametrize("secure", [False, True])
def test_what_is_accounted_for_has_independent_noise(known, secure):
    """C y: each client moves it by at most the norm, since its rounds are further apart than C has bands."""
    accounted = torch.from_numpy(dense(COEFFICIENTS, 4)).float() @ noise(mechanism(secure=secure), 4, 50_000)
    assert has_deviation(accounted.flatten(), 1.5 * 0.5)
    assert not has_deviation(accounted.flatten(), 1.05 * 1.5 * 0.5)
    assert (torch.corrcoef(accounted) - torch.eye(4)).abs().max() < 0.03


def test_one_group_is_the_gaussian_mechanism(known):
    one, plain = mechanism(Sampling("cyclic_poisson", 120, 10)), mechanism(POISSON, cls=GaussianMechanism)
    assert torch.equal(noise(one, 3), noise(plain, 3))
    assert one.epsilon == plain.epsilon > 0


@pytest.mark.parametrize(("rounds", "cycles"), [(1, 1), (3, 1), (4, 2), (30, 10)])
@pytest.mark.parametrize("name", ["pld", "rdp"])
def test_epsilon_is_that_of_poisson_samples_of_a_group_in_each_cycle(name, rounds, cycles):
    """Choquette-Choo et al. (2023), Theorem 4, by dp-accounting."""
    ledger = Ledger()
    ledger.add(CYCLIC, 1.5, rounds)
    known = dp.pld.PLDAccountant(value_discretization_interval=1e-3) if name == "pld" else dp.rdp.RdpAccountant()
    known.compose(dp.PoissonSampledDpEvent(10 / 40, dp.GaussianDpEvent(1.5)), cycles)
    assert Accountant(name, 1e-4).epsilon(ledger) == pytest.approx(known.get_epsilon(1e-4), rel=1e-6)


@needs_jax
@pytest.mark.parametrize("rounds", [7, 30])
def test_epsilon_is_that_of_jax_privacy(rounds):
    analysis = pytest.importorskip("jax_privacy.accounting").analysis
    accountants = pytest.importorskip("jax_privacy.accounting").accountants
    other = analysis.DpsgdTrainingAccountant(accountants.PldAccountantConfig(value_discretization_interval=1e-3))
    settings = analysis.DpParams(
        noise_multipliers=1.5, num_samples=120, delta=1e-4, batch_size=10, cycle_length=CYCLIC.groups
    )
    ledger = Ledger()
    ledger.add(CYCLIC, 1.5, rounds)
    expected = other.compute_epsilon(rounds, settings)
    assert Accountant("pld", 1e-4).epsilon(ledger) == pytest.approx(expected, rel=1e-6)


@needs_jax
def test_the_coefficients_have_the_least_error_of_running_sums():
    """Mean over rounds of the squared error of the sums, A C^-1, by another optimizer on dense matrices."""
    rounds, bands = 10, 3

    def error(free):
        coefficients = np.array([1.0, *free])
        sums = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(dense(coefficients, rounds))
        return (sums**2).sum() * (coefficients**2).sum()

    least = optimize.minimize(error, np.full(bands - 1, 0.3), method="Nelder-Mead", tol=1e-9)
    found = np.array(optimal_coefficients(rounds, bands))
    assert np.linalg.norm(found) == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(found[1:] / found[0], least.x, atol=1e-2)
    assert error(found[1:] / found[0]) < 1.0001 * least.fun < 0.9 * error(np.zeros(bands - 1))


def test_a_budget_bounds_the_rounds(known):
    """A cycle costs as soon as it has begun, so that the budget of two cycles of 3 is that of 4 rounds and of 6."""
    ledger = Ledger()
    ledger.add(CYCLIC, 1.5, 4)
    made = mechanism(epsilon=Accountant("rdp", 1e-4).epsilon(ledger))
    made.require_budget(6)
    with pytest.raises(PrivacyBudgetError, match=r"set trainer.max_epochs to 6 or less"):
        made.require_budget(7)
    noise(made, 5)
    assert not made.exhausted
    noise(made, 1)
    assert made.exhausted
    assert made.epsilon == made.budget


@pytest.mark.slow
def test_a_resumed_run_is_that_without_a_break(tmp_path, known):
    def made():
        settings = {"noise_multiplier": 1.0, "clipping": FixedClipping(0.2), "accountant": "rdp"}
        return module(privacy=BandedMatrixFactorization(1e-3, **settings))

    cyclic = {"sampling": "cyclic_poisson", "cycle_length": 3}
    saving = {"callbacks": [ModelCheckpoint(tmp_path / "ckpt", save_last=True)], "enable_checkpointing": True}
    whole, run = fitted(tmp_path, made(), rounds=4, **cyclic)
    fitted(tmp_path, made(), rounds=2, trainer_settings=saving, **cyclic)
    path = str(tmp_path / "ckpt" / "last.ckpt")
    resumed, again = fitted(tmp_path, made(), rounds=4, ckpt_path=path, **cyclic)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert again.callback_metrics["privacy/epsilon"] == run.callback_metrics["privacy/epsilon"]
    fresh = GaussianMechanism(1e-3, noise_multiplier=1.0, clipping=FixedClipping(0.2), accountant="rdp")
    with pytest.raises(ConfigurationError, match=r"continue with data.sampling cyclic_poisson"):
        fitted(tmp_path, module(privacy=fresh), rounds=4, ckpt_path=path)


def test_the_matrix_of_a_checkpoint_stays(known, monkeypatch):
    """Another one, as for more rounds, would not take back the noise of the earlier rounds."""
    made = mechanism()
    noise(made, 2)
    monkeypatch.setattr(module_of_noise, "optimal_coefficients", lambda rounds, bands: [0.6, 0.8, 0.0])
    resumed = mechanism(rounds=16)
    resumed.load_state_dict(made.state_dict())
    assert torch.equal(noise(resumed, 3), noise(made, 3))


# Refusals


def test_noise_that_changes_within_a_run_is_refused(known):
    made, other = mechanism(), mechanism(noise_multiplier=2.0)
    noise(made, 1)
    other.load_state_dict(made.state_dict())
    other.require_budget(None)
    with pytest.raises(ConfigurationError, match=r"set model.privacy.noise_multiplier to 1.5"):
        noise(other, 1)


def test_other_groups_are_refused(known):
    """A client of the last group could be in the next one, and come in two rounds whose noise is correlated."""
    with pytest.raises(ConfigurationError, match=r"seed is 8, the checkpoint's 7.*Set seed_everything .* to 7"):
        mechanism(seed=8).load_state_dict(mechanism().state_dict())


def test_what_it_does_not_account_for_is_refused(known):
    for sampling in (POISSON, Sampling("fixed", 120, 10)):
        with pytest.raises(ConfigurationError, match=rf"sampling is {sampling.kind}.*set it to cyclic_poisson"):
            mechanism(sampling)
    with pytest.raises(ConfigurationError, match=r"sampling is cyclic_poisson.*set it to poisson or fixed"):
        mechanism(cls=GaussianMechanism)
    with pytest.raises(ConfigurationError, match="set it to FixedClipping"):
        mechanism(clipping=AdaptiveClipping())
    with pytest.raises(ConfigurationError, match=r"set trainer.max_epochs"):
        mechanism(rounds=None)
    with pytest.raises(ConfigurationError, match="50 clients cannot be drawn from 120, divided into 3 groups"):
        mechanism(noise_cohort_size=50)
    with pytest.raises(ConfigurationError, match="trained with GaussianMechanism"):
        mechanism().load_state_dict(GaussianMechanism(1e-4, 1.0).state_dict())


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"BandedMatrixFactorization.*needs jax_privacy.*matrix-factorization"):
        mechanism()
