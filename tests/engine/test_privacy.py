"""Client-level differential privacy: numbers of the accountant, clipping, noise, budget and ledger."""

import math

import numpy as np
import pytest
import torch

from flow_pl.engine.client_update import ClientUpdate
from flow_pl.engine.privacy import (
    Accountant,
    AdaptiveClipping,
    FixedClipping,
    GaussianMechanism,
    Ledger,
    PrivacyBudgetError,
    Sampling,
    check_private,
)
from flow_pl.engine.privacy.noise import secure_noise, seeded_noise
from flow_pl.engine.server_round import ServerRound
from flow_pl.engine.training_statistics import TrainingStatistics
from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg, Flow, HypCluster, Local
from tests.support import bound

dp = pytest.importorskip("dp_accounting")
from scipy import integrate, stats  # noqa: E402

FIXED, POISSON = Sampling("fixed", 3400, 50), Sampling("poisson", 3400, 50)


def spent(name, sampling, noise, rounds, delta=1e-4):
    ledger = Ledger()
    ledger.add(sampling, noise, rounds)
    return Accountant(name, delta).epsilon(ledger)


@pytest.mark.parametrize(
    ("name", "sampling", "epsilon"), [("pld", POISSON, 2.90), ("rdp", POISSON, 3.26), ("rdp", FIXED, 6.11)]
)
def test_the_accountants_agree_with_known_numbers(name, sampling, epsilon):
    """50 of 3,400 clients, 1,500 rounds, noise multiplier 1, delta 1e-4."""
    assert spent(name, sampling, 1.0, 1500) == pytest.approx(epsilon, abs=0.005)


def test_without_sampling_epsilon_is_that_of_the_analytic_gaussian_mechanism():
    """Balle and Wang (ICML 2018), Theorem 8: T rounds of noise z are one of z / sqrt(T)."""
    noise, rounds = 8.0, 16
    mu = math.sqrt(rounds) / noise
    epsilon = spent("pld", Sampling("poisson", 100, 100), noise, rounds, delta=1e-5)
    delta = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(1e-5, rel=0.01)


def test_one_sampled_round_is_the_integral_of_its_densities():
    """delta = sup over both directions of the hockey-stick divergence of N(0, z) and the mixture with N(1, z)."""
    rate, noise, delta = 0.1, 0.8, 1e-4
    epsilon = spent("pld", Sampling("poisson", 100, 10), noise, 1, delta)

    def base(x):
        return stats.norm.pdf(x, 0, noise)

    def mixed(x):
        return (1 - rate) * base(x) + rate * stats.norm.pdf(x, 1, noise)

    def divergence(p, q):
        return integrate.quad(lambda x: max(0.0, p(x) - math.exp(epsilon) * q(x)), -12, 12, limit=2000)[0]

    assert max(divergence(mixed, base), divergence(base, mixed)) == pytest.approx(delta, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sampling"), [("pld", POISSON), ("rdp", POISSON), ("rdp", FIXED)])
def test_calibrated_noise_is_the_least_within_the_budget(name, sampling):
    noise = Accountant(name, 1e-4).calibrate(sampling, 200, 2.0)
    assert spent(name, sampling, noise, 200) <= 2.0 < spent(name, sampling, 0.99 * noise, 200)


def test_the_rounds_left_are_the_most_within_the_budget():
    accountant, ledger = Accountant("rdp", 1e-4), Ledger()
    ledger.add(POISSON, 1.0, 10)
    left = accountant.rounds_left(ledger, POISSON, 1.0, 1.5)
    assert accountant.epsilon(ledger.extended(POISSON, 1.0, left)) <= 1.5
    assert accountant.epsilon(ledger.extended(POISSON, 1.0, left + 1)) > 1.5


def test_a_ledger_composes_rounds_of_different_noise_and_survives_a_checkpoint():
    ledger, other = Ledger(), Ledger()
    for noise in (1.0, 1.0, 2.0):
        ledger.add(POISSON, noise)
    other.load_state_dict(ledger.state_dict())
    accountant = dp.rdp.RdpAccountant()
    for noise in (1.0, 1.0, 2.0):
        accountant.compose(dp.PoissonSampledDpEvent(50 / 3400, dp.GaussianDpEvent(noise)))
    assert [entry.rounds for entry in other.entries] == [2, 1]
    assert Accountant("rdp", 1e-4).epsilon(other) == pytest.approx(accountant.get_epsilon(1e-4))


def test_a_second_fit_with_other_noise_is_accounted_for_from_its_first_round():
    """With a budget, the epsilon of a round was computed at the end of the round before."""
    made = GaussianMechanism(1e-3, epsilon=5.0)
    for rounds in (50, 2):
        made.plan(Sampling("poisson", 100, 10), rounds, 0)
        made.close_round(0.0)
        assert made.epsilon == Accountant("pld", 1e-3).epsilon(made.ledger)


def test_cohorts_of_both_kinds_are_not_mixed():
    ledger = Ledger()
    ledger.add(POISSON, 1.0)
    ledger.add(FIXED, 1.0)
    with pytest.raises(ConfigurationError, match=r"continue with data.sampling poisson"):
        Accountant("rdp", 1e-4).epsilon(ledger)


# Clipping


def difference(clients=6, seed=0, size=7):
    """Updates of two groups, of norms from small to large."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, clients)

    def tensor(*shape):
        return torch.randn(clients, *shape, generator=random) * scale.view(-1, *[1] * len(shape))

    return {"global": {"a": tensor(size, 2), "b": tensor(3)}, "router": {"c": tensor(4)}}


def rows(groups):
    return torch.cat([p.flatten(1) for group in groups.values() for p in group.values()], 1)


def test_a_client_is_clipped_as_a_whole():
    updates = difference()
    factors, within = FixedClipping(2.0).factors(updates)
    norms = rows(updates).norm(dim=1)
    torch.testing.assert_close(factors, torch.minimum(torch.ones(6), 2.0 / norms))
    assert within.tolist() == (norms <= 2.0).tolist()
    assert 0 < within.sum() < 6


def test_clipping_by_group_keeps_the_bound_of_the_whole():
    updates = difference()
    factors, within = FixedClipping(2.0, per_group=True).factors(updates)
    for factor, group in zip(factors, updates.values(), strict=True):
        norms = rows({"": group}).norm(dim=1)
        torch.testing.assert_close(factor, torch.minimum(torch.ones(6), 2.0 / math.sqrt(2) / norms))
    clipped = [rows({"": group}) * factor[:, None] for factor, group in zip(factors, updates.values(), strict=True)]
    assert torch.cat(clipped, 1).norm(dim=1).max() <= 2.0 + 1e-5
    assert within.tolist() == (factors == 1).all(0).tolist()


def test_the_adaptive_norm_finds_the_quantile():
    """Without noise it ends where the share within it is the quantile: Andrew et al., section 2."""
    updates = difference(clients=101)
    norms = rows(updates).norm(dim=1)
    clipping = AdaptiveClipping(initial_norm=0.01, quantile=0.3, learning_rate=0.2)
    for _ in range(300):
        _, within = clipping.factors(updates)
        clipping.adapt(float(within.float().mean()))
    assert float((norms <= clipping.norm).float().mean()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("sensitivity", [1.0, 2.0])
def test_adaptive_clipping_costs_what_the_round_is_accounted_for(sensitivity):
    """Two Gaussian releases of multipliers a and b are one of (a^-2 + b^-2)^-1/2."""
    updates, deviation = AdaptiveClipping().split_noise(1.0, sensitivity, 50)
    count = deviation / (sensitivity / 2)
    assert (updates**-2 + count**-2) ** -0.5 == pytest.approx(1.0)
    assert deviation == 2.5


# Noise


def mechanism(noise=1.0, norm=0.5, sampling=None, seed=7, **settings):
    made = GaussianMechanism(1e-4, noise_multiplier=noise, clipping=FixedClipping(norm), accountant="rdp", **settings)
    made.plan(Sampling("poisson", 100, 20) if sampling is None else sampling, 4, seed)
    return made


def has_deviation(sample, deviation):
    """Whether normals come from this deviation, by the chi-square distribution of their squares, at 1e-6."""
    statistic = float((sample.double() / deviation).square().sum())
    return 1e-6 < stats.chi2.cdf(statistic, len(sample)) < 1 - 1e-6


def noise_of(made, size=200_000):
    sums = torch.zeros(size)
    made.perturb(sums, torch.zeros(()))
    return sums


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(("kind", "sensitivity"), [("poisson", 1.0), ("fixed", 2.0)])
def test_the_noise_has_the_deviation_that_is_accounted_for(secure, kind, sensitivity):
    """noise multiplier x sensitivity: one clipping norm where a client is added, two where it is replaced."""
    sample = noise_of(mechanism(noise=1.3, norm=0.5, sampling=Sampling(kind, 100, 20), secure=secure))
    expected = 1.3 * sensitivity * 0.5
    assert has_deviation(sample, expected)
    assert not has_deviation(sample, 1.05 * expected)
    assert not has_deviation(sample, expected / 1.05)
    assert abs(float(sample.mean())) < 6 * expected / math.sqrt(len(sample))
    assert stats.kstest((sample / expected).numpy()[:20_000], "norm").pvalue > 1e-6


def test_noise_of_a_simulated_cohort_is_that_of_its_mean():
    """A mean over 20 gets the noise of one over 400: the sum's is divided by 20."""
    made = mechanism(noise_cohort_size=400, population=10_000)
    sample = noise_of(made)
    assert has_deviation(sample, 0.5 * 20 / 400)
    made.close_round(0.0)
    ledger = Ledger()
    ledger.add(Sampling("poisson", 10_000, 400), 1.0)
    assert made.epsilon == Accountant("rdp", 1e-4).epsilon(ledger)
    assert made.simulated
    assert "simulated" in made.describe()


def test_no_two_rounds_share_noise_and_the_seed_repeats_it():
    made, again = mechanism(), mechanism()
    rounds = []
    for _ in range(3):
        sample = noise_of(made, 1000)
        assert torch.equal(sample, noise_of(again, 1000))
        rounds.append(sample)
        made.close_round(0.0)
        again.close_round(0.0)
    assert abs(float(torch.corrcoef(torch.stack(rounds))[0, 1])) < 0.2
    resumed = mechanism()
    resumed.load_state_dict(made.state_dict())
    fourth = noise_of(resumed, 1000)
    assert torch.equal(fourth, noise_of(made, 1000))
    assert not any(torch.equal(fourth, sample) for sample in rounds)
    assert not torch.equal(fourth, noise_of(mechanism(seed=8), 1000))
    assert not np.array_equal(seeded_noise(9, 1, 2, 0), seeded_noise(9, 1, 2, 1))
    assert not np.array_equal(secure_noise(9), secure_noise(9))


def update(updates, weights=None):
    clients = len(next(iter(updates["global"].values())))
    weights = torch.ones(clients) if weights is None else weights
    return ClientUpdate(
        torch.arange(clients), updates, dict.fromkeys(updates, weights), TrainingStatistics(torch.device("cpu")), {}
    )


def server_updates(method, clients, scale=1.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    groups = {"global": dict(method.modules["global"].named_parameters())}
    return {
        name: {key: scale * torch.randn(clients, *p.shape, generator=random) for key, p in group.items()}
        for name, group in groups.items()
    }


@pytest.mark.parametrize("clients", [0, 1, 30])
def test_a_private_round_is_the_clipped_sum_and_its_noise_over_the_expected_cohort(clients):
    """Whoever has come, nobody included; an update that is not finite counts as none."""
    method, made = bound(FedAvg()), mechanism()
    updates = server_updates(method, clients)
    expected = torch.zeros(1)
    if clients:
        matrix = rows(updates)
        expected = (matrix * (0.5 / matrix.norm(dim=1, keepdim=True)).clamp_max(1)).sum(0)
    size = sum(p.numel() for p in method.modules["global"].parameters())
    noise = 0.5 * torch.from_numpy(seeded_noise(size, 7, 0, 0))
    round_ = ServerRound(method, privacy=made)
    for start in range(0, clients, 7):
        piece = {n: {k: p[start : start + 7].clone() for k, p in g.items()} for n, g in updates.items()}
        round_.add(update(piece))
    figures = round_.finish(lambda tensor: tensor, 0)
    found = torch.cat([p.grad.flatten() for p in method.modules["global"].parameters()])
    torch.testing.assert_close(found, -(expected + noise) / 20)
    assert figures["clients"] == clients
    assert made.ledger.rounds == 1


def test_one_client_moves_the_sum_by_no_more_than_the_norm():
    method = bound(FedAvg())
    for scale in (1e-3, 1.0, 1e6, math.inf):
        round_ = ServerRound(method, max_rejected=0.99, privacy=mechanism(noise=1e-9))
        updates = server_updates(method, 2, 1e-3)
        for p in updates["global"].values():
            p[1] *= scale
        round_.add(update(updates))
        moved = []
        round_.finish(lambda tensor, moved=moved: moved.append(tensor.clone()) or tensor, 0)
        first = rows({"": {k: p[:1] for k, p in updates["global"].items()}})[0]
        assert (moved[0][: len(first)] - first).norm() <= 0.5 + 1e-4


def test_the_count_of_the_adaptive_norm_is_noisy_and_sums_over_chunks():
    """The norm moves by exp(-0.2 (share - 0.5)), the share over the expected cohort of 20 and with its own noise."""
    method = bound(FedAvg())
    made = GaussianMechanism(1e-4, noise_multiplier=0.5, clipping=AdaptiveClipping(3.0), accountant="rdp")
    made.plan(Sampling("poisson", 100, 20), 4, 7)
    round_ = ServerRound(method, privacy=made)
    within = 0
    for seed in range(3):
        updates = server_updates(method, 5, 0.4, seed)
        within += int((rows(updates).norm(dim=1) <= 3.0).sum())
        round_.add(update(updates))
    round_.finish(lambda tensor: tensor, 0)
    noise = float(seeded_noise(1, 7, 0, 1)[0]) * 20 / 20
    share = (within - 15 / 2 + noise) / 20 + 0.5
    assert made.clipping.norm == pytest.approx(3.0 * math.exp(-0.2 * (share - 0.5)), rel=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"delta": 1.0, "epsilon": 1.0}, "delta is 1.0, expected less than 1"),
        ({"delta": 0.0, "epsilon": 1.0}, "delta is 0.0, expected a number greater than 0"),
        ({"delta": 1e-5}, "expected at least one of them"),
        ({"delta": 1e-5, "epsilon": -1.0}, "epsilon is -1.0"),
        ({"delta": 1e-5, "noise_multiplier": 0.0}, "noise_multiplier is 0.0"),
        ({"delta": 1e-5, "epsilon": math.nan}, "epsilon is nan"),
        ({"delta": 1e-5, "epsilon": 1.0, "noise_cohort_size": 0}, "noise_cohort_size is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        GaussianMechanism(**settings)


@pytest.mark.parametrize("make", [FixedClipping, AdaptiveClipping])
@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf])
def test_a_norm_that_is_not_positive_is_refused(make, norm):
    with pytest.raises(ConfigurationError, match="norm is"):
        make(norm)


def test_what_does_not_fit_the_run_is_refused():
    plain = {"delta": 1e-4, "noise_multiplier": 1.0}
    with pytest.raises(ConfigurationError, match=r"set data.sampling to poisson"):
        GaussianMechanism(**plain).plan(FIXED, 10, 0)
    with pytest.raises(ConfigurationError, match=r"set trainer.max_epochs"):
        GaussianMechanism(1e-4, epsilon=1.0).plan(POISSON, None, 0)
    with pytest.raises(ConfigurationError, match="1000 clients cannot be drawn from 100"):
        GaussianMechanism(**plain, noise_cohort_size=1000).plan(Sampling("poisson", 100, 20), 10, 0)
    with pytest.raises(ConfigurationError, match=r"count_noise is 0.1, expected more than 0.5"):
        GaussianMechanism(**plain, clipping=AdaptiveClipping(count_noise=0.1)).plan(POISSON, 10, 0)


@pytest.mark.slow
def test_more_rounds_than_the_budget_allows_are_refused_with_the_number_that_it_does():
    made = GaussianMechanism(1e-4, epsilon=1.0, noise_multiplier=1.0, accountant="rdp")
    made.plan(POISSON, 1500, 0)
    with pytest.raises(PrivacyBudgetError, match=r"set trainer.max_epochs to (\d+) or less") as caught:
        made.require_budget(1500)
    allowed = int(str(caught.value).split("set trainer.max_epochs to ")[1].split()[0])
    made.require_budget(allowed)
    with pytest.raises(PrivacyBudgetError):
        made.require_budget(allowed + 1)


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        (HypCluster(clusters=2), {}, "HypCluster"),
        (Local(), {}, "send nothing"),
        (FedAvg(), {"weighting": "examples"}, "set model.loop.weighting to uniform"),
        (FedAvg(), {"mean": False}, "model.aggregation"),
        (FedAvg(), {"precision": "16-mixed"}, "bf16-mixed"),
    ],
    ids=["participation", "nothing", "weights", "aggregation", "precision"],
)
def test_what_cannot_be_private_is_refused(method, change, said):
    with pytest.raises(ConfigurationError, match=said):
        check_private(bound(method), **{"weighting": "uniform", "mean": True, "precision": "32-true", **change})


def test_flow_can_be_private():
    check_private(bound(Flow()), "uniform", mean=True, precision="32-true")
