"""A trained server from its files, and a personalized model for one client, outside any trainer."""

import numpy as np
import pytest
import torch

from flow_pl.cli import run
from flow_pl.data import SyntheticData
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.methods import FedAvg, FineTuning, Flow, KNNPer
from flow_pl.serving import load, personalize
from tests.test_module import module as trained

CONFIGS = ("task/synthetic", "tuned/synthetic/flow")
X, Y = torch.randn(11, 8), torch.arange(11) % 3


def test_without_personalization_it_is_w_g():
    module = trained(FedAvg())
    assert torch.equal(personalize(module, X, Y)(X), module(X))


def test_fine_tuning_moves_a_copy():
    module = trained(FineTuning())
    before = module(X)
    model = personalize(module, X, Y)
    assert torch.equal(module(X), before)
    loss = torch.nn.functional.cross_entropy
    assert loss(model(X), Y) < loss(before, Y)


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_it_predicts_as_an_evaluation_does(routing):
    """The same client, evaluated by the loop: the personalized outputs are equal."""
    module = trained(Flow(split="none", routing=routing, regularization=0.0))
    model = personalize(module, X, Y)
    module.eval()  # without dropout
    predicted = module.method.predict(model._groups, X)
    torch.testing.assert_close(model(X), predicted.personalized)
    assert not torch.equal(predicted.personalized, predicted.generalized)


def test_the_seed_draws_the_order():
    module = trained(FineTuning())
    first, again, other = (personalize(module, X, Y, seed)(X) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_modules_keep_their_modes():
    module = trained(KNNPer()).train()
    personalize(module, X, Y)(X)
    assert module.backbone.training


@pytest.mark.parametrize(("x", "y"), [(X[:0], Y[:0]), (X, Y[:3])])
def test_examples_and_targets_must_match(x, y):
    with pytest.raises(DataError, match="expected one for each, and at least one"):
        personalize(trained(FedAvg()), x, y)


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A round of Flow by the command line: the module, its checkpoint and the configuration that the run saved."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--trainer.max_epochs=1", f"--trainer.default_root_dir={folder}", f"--data.cache_dir={folder / 'cache'}"]
    options += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.limit_val_batches=0"]
    cli = run(["fit", *(f"--config={name}" for name in CONFIGS), *options])
    (saved,) = folder.glob("logs/*/config.yaml")
    return cli.model, folder / "checkpoints" / "last.ckpt", saved


@pytest.mark.parametrize("which", ["shipped", "saved"])
def test_what_is_loaded_is_what_was_trained(trained_run, tmp_path, monkeypatch, capfd, which):
    """And nothing else happens: no file, no word, no random number."""
    model, checkpoint, saved = trained_run
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 (the state that others share)
    config = saved if which == "saved" else CONFIGS
    module, data = load(config, checkpoint, f"--data.cache_dir={tmp_path / 'stores'}", "--data.cohort_size=3")
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
    expected, found = model.state_dict(), module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], p) for name, p in expected.items())
    assert isinstance(data, SyntheticData)
    assert data.cohort_size == 3


def test_a_loaded_module_serves_as_the_trained_one(trained_run):
    model, checkpoint, saved = trained_run
    x, y = torch.randn(9, 20), torch.arange(9) % 5
    module, data = load(saved, checkpoint)
    served, expected = (personalize(each, data.transform(x), y)(data.transform(x)) for each in (module, model))
    assert torch.equal(served, expected)


def test_the_loaded_data_are_those_of_the_run(trained_run):
    """Set up only on demand."""
    _, checkpoint, saved = trained_run
    _, data = load(saved, checkpoint)
    with pytest.raises(RuntimeError, match="not set up"):
        data.federation  # noqa: B018
    data.prepare_data()
    data.setup()
    assert data.num_classes == 5


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (("task/synthetic", "method/fedavg"), (), "written by the method Flow, this configuration has FedAvg"),
        (CONFIGS, ("--model.backbone.hidden=[7]",), "other parameters than this configuration's"),
        (CONFIGS, ("--model.method.nothing=1",), "flow.yaml cannot be used: .*\n.*\n.*'nothing' is not accepted"),
        (CONFIGS, ("--data.cohort_size=-1",), "cohort_size is -1"),
        (CONFIGS, ("--model.backbone=os.getcwd",), "os.getcwd"),
        ("absent.yaml", (), "there is no configuration absent.yaml"),
    ],
)
def test_what_does_not_fit_is_refused(trained_run, config, options, words):
    with pytest.raises(ConfigurationError, match=words):
        load(config, trained_run[1], *options)


def test_a_damaged_checkpoint_is_refused_by_name(trained_run, tmp_path):
    damaged = tmp_path / "half.ckpt"
    damaged.write_bytes(trained_run[1].read_bytes()[:-5000])
    with pytest.raises(ConfigurationError, match=r"half\.ckpt is damaged or truncated"):
        load(CONFIGS, damaged)
