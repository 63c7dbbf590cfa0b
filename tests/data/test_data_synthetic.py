import numpy as np
import pytest

from flow_pl.data import SyntheticData
from flow_pl.errors import ConfigurationError
from flow_pl.utils.rng import Stream, generator


def clients(**settings):
    return list(SyntheticData(**settings).clients())


def test_the_published_size_of_the_data():
    data = clients()
    assert len(data) == 30
    sizes = [len(client.x) for client in data]
    assert min(sizes) >= 50
    assert data[0].x.shape[1:] == (60,)
    assert data[0].x.dtype == np.float32
    assert np.unique(np.concatenate([client.y for client in data])).tolist() == list(range(10))


def test_labels_follow_the_definition():
    """The labels, made again from the concepts, drawn in the order that SyntheticData documents."""
    settings = {"alpha": 0.5, "beta": 2.0, "num_clients": 5, "num_features": 7, "num_classes": 4, "split_seed": 3}
    data = SyntheticData(**settings, shared_fraction=0.4, max_size=300)
    threshold = data.clients().threshold
    random = generator(3, Stream.CONCEPT)
    shared = random.normal(0, 1, (4, 7)), random.normal(0, 1, 4)
    for index, (_, x, y, *_) in enumerate(data.clients()):
        random = generator(3, Stream.SYNTHETIC, index)
        size = 50 + int(random.lognormal(4, 2))
        assert len(x) == min(size, 300)
        mean = random.normal(random.normal(0, 2.0), 1, 7)
        assert (
            np.abs(x.mean(0) - mean).max() < 0.6
        )  # six standard errors of the first feature, of 50 instances and more
        own_mean = random.normal(0, 0.5)
        own = random.normal(own_mean, 1, (4, 7)), random.normal(own_mean, 1, 4)
        for instance, label in zip(x.astype(float), y, strict=True):
            weight, bias = shared if instance[0] > threshold else own
            assert label == np.argmax(weight @ instance + bias)


def test_variance_of_the_features():
    """Var(x_j) = j^-1.2 within a client: 4,000 instances give it to within some 10 %."""
    (client,) = clients(num_clients=1, min_size=4000, mean_log_size=-5, sigma_log_size=0)
    np.testing.assert_allclose(client.x.var(axis=0), np.arange(1, 61) ** -1.2, rtol=0.12)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_shared_fraction(fraction):
    data = SyntheticData(shared_fraction=fraction, num_clients=40, min_size=400, sigma_log_size=0.5)
    generated = data.clients()
    above = np.concatenate([client.x[:, 0] > generated.threshold for client in generated])
    assert above.mean() == pytest.approx(fraction, abs=0.015)  # 18,000 instances: four standard errors


def test_shared_fraction_changes_labels_of_shared_instances_only():
    none, half, everything = (clients(shared_fraction=fraction, num_clients=8) for fraction in (0, 0.5, 1))
    threshold = SyntheticData(shared_fraction=0.5, num_clients=8).clients().threshold
    for own, mixed, shared in zip(none, half, everything, strict=True):
        np.testing.assert_array_equal(own.x, mixed.x)
        is_shared = mixed.x[:, 0] > threshold
        np.testing.assert_array_equal(mixed.y, np.where(is_shared, shared.y, own.y))


def test_most_clients_have_instances_of_both_kinds():
    data = SyntheticData(shared_fraction=0.5)
    threshold = data.clients().threshold
    shares = [(client.x[:, 0] > threshold).mean() for client in data.clients()]
    assert np.mean([0.02 < share < 0.98 for share in shares]) > 0.5


def test_a_client_depends_on_the_seed_and_its_index_alone():
    few, many, other = clients(num_clients=2), clients(num_clients=5), clients(num_clients=2, split_seed=1)
    np.testing.assert_array_equal(few[1].x, many[1].x)
    np.testing.assert_array_equal(few[1].y, many[1].y)
    assert few[1].x[0, 0] != other[1].x[0, 0]
    assert few[0].x[0, 0] != few[1].x[0, 0]


def test_beta_spreads_the_features():
    def spread(beta):
        return np.std([client.x.mean() for client in clients(beta=beta, max_size=60)])

    assert spread(5) > 5 * spread(0)


def test_sizes_are_limited():
    sizes = [len(client.x) for client in clients(min_size=20, max_size=30)]
    assert min(sizes) >= 20
    assert max(sizes) == 30


def test_the_number_of_classes_is_as_asked_for(tmp_path):
    data = SyntheticData(num_classes=50, num_clients=2, max_size=60, cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup()
    assert data.num_classes == 50
    assert data.feature_shape == (60,)


def test_every_setting_makes_a_store_of_its_own():
    base = SyntheticData().options()
    for name, value in base.items():
        setting = {"seed": "split_seed"}.get(name, name)
        changed = SyntheticData(
            **{setting: 500 if value is None else value + 1 if value else 0.5 if isinstance(value, float) else 7}
        )
        assert changed.options() != base


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clients": 0}, "num_clients is 0"),
        ({"num_features": -1}, "num_features is -1"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"min_size": 0}, "min_size is 0"),
        ({"alpha": -1}, "alpha is -1, expected 0 or more"),
        ({"beta": -1}, "beta is -1"),
        ({"sigma_log_size": -1}, "sigma_log_size is -1"),
        ({"shared_fraction": 1.2}, "shared_fraction is 1.2, expected a share from 0 to 1"),
        ({"max_size": 10}, "max_size is 10, expected at least min_size, which is 50: raise it"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        SyntheticData(**settings)
