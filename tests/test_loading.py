"""A finished run is loaded: the model as it was trained, what its clients kept, and the data."""

import numpy as np
import pytest
import torch

from flow_pl.cli import run
from flow_pl.data import SyntheticData
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.serving import PersonalModel, load, load_kept, personalize

CONFIGS = ("task/synthetic", "tuned/synthetic/flow")
DITTO = ("task/synthetic", "method/ditto")
X, Y = torch.randn(11, 8), torch.arange(11) % 3


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A round of Flow by the command line: the module, its checkpoint and the configuration that the run saved."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--trainer.max_epochs=1", f"--trainer.default_root_dir={folder}", f"--data.cache_dir={folder / 'cache'}"]
    options += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.limit_val_batches=0"]
    cli = run(["fit", *(f"--config={name}" for name in CONFIGS), *options])
    (saved,) = folder.glob("logs/*/config.yaml")
    return cli.model, folder / "checkpoints" / "last.ckpt", saved


def test_what_clients_kept_is_loaded_by_name(tmp_path):
    """A round of Ditto with all clients: each one's v is the one that the loop's own evaluation reads."""
    options = ["--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}", f"--data.cache_dir={tmp_path}/cache"]
    options += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.limit_val_batches=0"]
    cli = run(["fit", *(f"--config={name}" for name in DITTO), *options])
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    module, _ = load(DITTO, checkpoint)
    states, data = cli.model.states, cli.datamodule
    sampled = states.known().tolist()
    initial = module.method.initial_state(server_groups(module.method))
    for client in sampled[:2]:
        kept = load_kept(module, checkpoint, data.client_name(client))
        expected = states.read(torch.tensor([client]), initial)
        assert all(torch.equal(p, expected["personal"][key][0]) for key, p in kept["personal"].items())
        assert isinstance(personalize(module, *data.examples(client, "train"), kept=kept), PersonalModel)
    with pytest.raises(DataError, match=r"client 'nobody' has no state in the checkpoint, which has that of"):
        load_kept(module, checkpoint, "nobody")
    other, _ = load(DITTO, checkpoint)
    other.method.private = {"received": "received", "personal": "personal"}
    with pytest.raises(ConfigurationError, match="the checkpoint's clients keep"):
        load_kept(other, checkpoint, data.client_name(sampled[0]))


def test_a_stateless_method_has_nothing_kept_to_load(trained_run):
    module, checkpoint, _ = trained_run
    with pytest.raises(ConfigurationError, match="clients of Flow keep nothing between rounds"):
        load_kept(module, checkpoint, "0")


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
        (CONFIGS, ("--model.backbone.hidden=[7]",), "different parameters than this configuration's"),
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
