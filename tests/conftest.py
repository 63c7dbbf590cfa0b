"""Settings of the whole suite, and a finished run that tests share."""

import os
import shutil
from pathlib import Path

import pytest
import torch

LEFT = ("runs", "figures", "lightning_logs", "wandb", "checkpoints")
"""Folders that a run writes into the folder it is started from, unless a test gives it another one."""


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small tensors: a second thread costs more than it brings, above all beside another process."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leaves_nothing(pytestconfig):
    """A test writes into a folder of its own."""
    started = pytestconfig.invocation_params.dir
    before = set(os.listdir(started))
    yield
    assert not set(os.listdir(started)).difference(before).intersection(LEFT), f"the test has left files in {started}"


@pytest.fixture(scope="session")
def _finished_once(tmp_path_factory):
    from flow_pl.cli import run
    from tests.test_cli import TINY

    root = tmp_path_factory.mktemp("finished")
    (root / "tiny.yaml").write_text(TINY.format(root=root))
    run(["fit", "--config", str(root / "tiny.yaml"), "--trainer.logger=false", "--trainer.enable_progress_bar=false"])
    return root


@pytest.fixture
def finished(config, _finished_once):
    """The folder of a finished fit of the test's `config`: a copy of one that all tests share, so with its paths."""
    root = Path(config).parent
    for name in ("run", "cache"):
        shutil.copytree(_finished_once / name, root / name)
    return root / "run"
