import sys

import numpy as np
import pytest
import torch

from flow_pl.data import DigitsData
from flow_pl.data.digits import divide, in_handwriting
from flow_pl.errors import ConfigurationError

datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
DIGITS = datasets.load_digits()
IMAGES = torch.from_numpy(DIGITS.images).float().unsqueeze(1) / 16


@pytest.fixture(autouse=True)
def _parsed_once(monkeypatch):
    monkeypatch.setattr(datasets, "load_digits", lambda: DIGITS)


def clients(**settings):
    return list(DigitsData(**settings).clients())


def test_every_image_belongs_to_one_writer():
    """Without a style the images are the originals, so they can be told apart."""
    given = sorted(zip(DIGITS.data.astype(int).tolist(), DIGITS.target.tolist(), strict=True))
    found = []
    for _, x, y, *_ in clients(style_strength=0):
        images = np.rint(x / 255 * 16).astype(int).reshape(len(x), 64)
        found += zip(images.tolist(), y.tolist(), strict=True)
    assert sorted(found) == given


def test_images_are_bytes_of_one_channel():
    (first, *_) = clients(num_clients=3)
    assert first.x.shape[1:] == (1, 8, 8)
    assert first.x.dtype == np.uint8
    assert first.x.max() > 200


@pytest.mark.parametrize("num_clients", [1, 10, 100])
@pytest.mark.parametrize("alpha", [0.01, 1, 1000])
def test_no_writer_is_empty(num_clients, alpha):
    data = clients(num_clients=num_clients, dirichlet_alpha=alpha, min_size=8)
    assert len(data) == num_clients
    assert min(len(client.x) for client in data) >= 8
    assert sum(len(client.x) for client in data) == 1797


def test_a_small_alpha_skews_the_labels():
    def distance(alpha):
        """Total variation between a writer's labels and all labels, over writers."""
        pool = np.bincount(DIGITS.target) / 1797
        shares = [np.bincount(client.y, minlength=10) / len(client.y) for client in clients(dirichlet_alpha=alpha)]
        return np.mean([np.abs(share - pool).sum() / 2 for share in shares])

    assert distance(0.1) > 0.6
    assert distance(1000) < 0.2


def test_writers_write_differently():
    """The same image in two hands differs by far more than rounding, and the more so the stronger the style."""

    def difference(strength):
        hands = torch.stack([in_handwriting(np.random.default_rng(hand), IMAGES[:50], strength) for hand in range(10)])
        return (hands - hands.mean(0)).abs().mean().item()

    assert difference(0) == 0
    assert 0.02 < difference(0.3) < difference(1)
    torch.testing.assert_close(in_handwriting(np.random.default_rng(0), IMAGES, 0), IMAGES, atol=1e-5, rtol=0)


def test_a_hand_is_one_for_all_images_and_keeps_their_range():
    images = IMAGES[:20]
    together = in_handwriting(np.random.default_rng(1), images, 1.0)
    alone = torch.cat([in_handwriting(np.random.default_rng(1), image[None], 1.0) for image in images])
    torch.testing.assert_close(together, alone)
    assert together.shape == images.shape
    assert together.min() >= 0
    assert together.max() <= 1


def test_writers_depend_on_the_split_seed():
    def pixels(seed):
        return [client.x.sum() for client in clients(split_seed=seed, num_clients=5)]

    assert pixels(0) == pixels(0) != pixels(1)


def test_dividing_fills_up_small_clients_from_large_ones():
    labels = np.repeat([0, 1], 10)
    owned = divide(np.random.default_rng(0), labels, 5, alpha=0.01, min_size=4)
    assert [len(rows) for rows in owned] == [4] * 5
    assert sorted(np.concatenate(owned).tolist()) == list(range(20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clients": 200}, "num_clients is 200 with min_size 10, .* only 1797 examples: set num_clients to 179"),
        ({"num_clients": 0}, "num_clients is 0"),
        ({"dirichlet_alpha": 0}, "dirichlet_alpha is 0"),
        ({"min_size": 0}, "min_size is 0"),
        ({"style_strength": -1}, "style_strength is -1, expected 0 or more"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        clients(**settings)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigurationError, match=r'this data needs sklearn .*: pip install "scikit-learn>='):
        clients()


def test_the_data_module(tmp_path):
    data = DigitsData(cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup()
    assert (data.feature_shape, data.num_classes) == ((1, 8, 8), 10)
    assert data.example().max() <= 1
    assert data.client_name(3) == "writer_0003"
