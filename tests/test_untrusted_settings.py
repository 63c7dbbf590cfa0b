"""Checkpoints and configurations of others: nothing in them runs code, but for the classes that a user names."""

import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
import yaml

from flow_pl.checks import check_class_paths
from flow_pl.cli import run
from flow_pl.data import PartitionedData, Vectors
from flow_pl.errors import ConfigurationError
from flow_pl.methods import Ditto, Flow
from tests.test_cli import TINY, config, fails  # noqa: F401 (a fixture)


class Touch:
    """What an attacker pickles: it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def trained(config, finished):  # noqa: F811
    """A configuration and the last checkpoint of its run."""
    return config, finished / "checkpoints" / "last.ckpt"


def poison(checkpoint, **entries):
    torch.save({**torch.load(checkpoint, weights_only=True), **entries}, checkpoint)


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ("fit", "top"),
        ("test", "state_dict"),
        pytest.param("validate", "top", marks=pytest.mark.slow),
        pytest.param("predict", "hyper_parameters", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_with_a_pickled_object_is_refused_and_the_object_is_not_made(trained, capsys, stage, place):
    config, last = trained  # noqa: F811
    trap = config.parent / "trap"
    poison(last, **{place: Touch(trap)} if place == "top" else {place: {"global.0.weight": Touch(trap)}})
    status, message = fails(capsys, stage, "--config", config, "--ckpt_path", last)
    assert status == 1
    assert f"the checkpoint {last} " in message
    assert "it holds Python objects, which may run arbitrary code: posix.system" in message
    assert not trap.exists()


def test_the_trap_itself_works(tmp_path):
    torch.save({"a": Touch(tmp_path / "trap")}, tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("path", ["last", "hpc"])
def test_a_checkpoint_that_lightning_finds_itself_is_refused_as_well(trained, capsys, path):
    config, last = trained  # noqa: F811
    trap = config.parent / "trap"
    poison(last, loops=Touch(trap))
    if path == "hpc":
        shutil.move(last, config.parent / "run" / "hpc_ckpt_1.ckpt")
    status, message = fails(capsys, "fit", "--config", config, "--ckpt_path", path, "--trainer.max_epochs=3")
    assert status == 1
    assert "it holds Python objects, which may run arbitrary code: posix.system" in message
    assert not trap.exists()


def test_a_file_that_is_a_pickle_and_no_checkpoint_is_refused(trained, capsys):
    config, last = trained  # noqa: F811
    trap = config.parent / "trap"
    torch.save(Touch(trap), last, _use_new_zipfile_serialization=False)
    status, message = fails(capsys, "test", "--config", config, "--ckpt_path", last)
    assert status == 1
    assert f"the checkpoint {last} is damaged or truncated" in message
    assert not trap.exists()


def test_settings_in_a_checkpoint_are_not_put_over_the_configuration(trained, capsys):
    """Lightning would take a class path from there."""
    config, last = trained  # noqa: F811
    poison(last, hyper_parameters={"server_optimizer": "torch.optim.Adam"})
    status, message = fails(capsys, "test", "--config", config, "--ckpt_path", last)
    assert status == 1
    assert "it holds settings, which belong only in the configuration" in message


def test_a_compressed_checkpoint_is_refused(trained, capsys):
    config, last = trained  # noqa: F811
    with zipfile.ZipFile(last) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(last, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    status, message = fails(capsys, "test", "--config", config, "--ckpt_path", last)
    assert status == 1
    assert "its parts are compressed" in message


def test_weights_only_cannot_be_switched_off(trained, capsys):
    config, last = trained  # noqa: F811
    status, message = fails(capsys, "test", "--config", config, "--ckpt_path", last, "--weights_only=false")
    assert status == 1
    assert "weights_only is false, expected true" in message


@pytest.mark.slow
@pytest.mark.parametrize("method", [Flow, Ditto])
def test_our_own_checkpoints_hold_nothing_but_tensors_and_plain_values(config, method):  # noqa: F811
    """With a scheduler, an optimizer with state, what clients keep, and every default callback."""
    settings = yaml.safe_load(config.read_text())
    if method is Ditto:
        settings["model"]["method"] = {"class_path": "Ditto", "init_args": {}}
    settings["model"]["server_optimizer"] = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    settings["model"]["server_scheduler"] = {
        "class_path": "torch.optim.lr_scheduler.OneCycleLR",
        "init_args": {"max_lr": 0.1, "total_steps": 50},
    }
    config.write_text(yaml.safe_dump(settings))
    options = ["--config", str(config), "--trainer.enable_progress_bar=false"]
    run(["fit", *options])
    last = config.parent / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert torch.serialization.get_unsafe_globals_in_checkpoint(last) == []
    resumed = run(["fit", *options, "--ckpt_path", str(last), "--trainer.max_epochs=3"])
    assert resumed.trainer.global_step == 3


COMMAND = ["touch", "trap"]
CALLS = {
    "system": {"class_path": "os.system", "init_args": {"command": "touch trap"}},
    "Popen": {"class_path": "subprocess.Popen", "init_args": {"args": COMMAND}},
    "check_call": {"class_path": "subprocess.check_call", "init_args": {"args": COMMAND}},
}


@pytest.mark.parametrize("call", ["system", pytest.param("Popen", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "key",
    [
        *("model.server_optimizer", "model.server_scheduler", "model.backbone", "model.method", "model.objective"),
        *("model.loop", "model.loop.init_args.client_optimizer", "model.loop.init_args.client_scheduler"),
        "model.method.init_args.router",
        *("trainer.callbacks", "trainer.logger", "data"),
    ],
)
def test_a_class_path_must_be_of_the_class_that_the_setting_is_for(config, capsys, key, call):  # noqa: F811
    settings = yaml.safe_load(config.read_text())
    node = settings
    *path, last = key.split(".")
    for name in path:
        node = node.setdefault(name, {})
    node[last] = [CALLS[call]] if key == "trainer.callbacks" else CALLS[call]
    config.write_text(yaml.safe_dump(settings))
    status, message = fails(capsys, "fit", "--config", config)
    assert status in (1, 2)
    assert (key.split(".")[0] if status == 2 else "which is not a class") in message
    assert not (config.parent / "trap").exists()


@pytest.mark.parametrize("call", ["check_call", "shutil.rmtree"])
def test_a_function_must_be_annotated_to_return_what_may_be_called(call):
    path = CALLS[call]["class_path"] if call in CALLS else call
    with pytest.raises(ConfigurationError, match=f"class_path is {path}, which is not a class"):
        check_class_paths({"a": [{"b": {"class_path": path, "init_args": {}}}]})
    check_class_paths({"class_path": f"{__name__}.{make_backbone.__name__}"})


def make_backbone() -> torch.nn.Module:
    return torch.nn.Linear(1, 1)


@pytest.mark.parametrize("call", ["system", "Popen", "check_call"])
def test_a_partitioner_must_be_one_before_it_is_called(tmp_path, monkeypatch, call):
    pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", x=np.ones((4, 2)), y=np.arange(4))
    data = PartitionedData("a.npz", CALLS[call], Vectors(), cache_dir="cache")
    with pytest.raises(ConfigurationError, match="is not a partitioner of flwr_datasets"):
        data.prepare_data()
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch trap']",
        "!!python/object/new:subprocess.Popen [['touch', 'trap']]",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_yaml_tags_make_no_objects(tmp_path, monkeypatch, capsys, value):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tagged.yaml"
    path.write_text(TINY.format(root=tmp_path).replace("seed_everything: 1", f"seed_everything: {value}"))
    status, message = fails(capsys, "fit", "--config", path)
    assert status == 2
    assert "could not determine a constructor for the tag" in message
    assert not (tmp_path / "trap").exists()
