"""Every command and every piece of code in the README runs."""

import glob
import re
import shlex
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb

import flow_pl.methods
from flow_pl.__main__ import main
from flow_pl.engine.server_round import server_groups
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FineTuning
from tests.support import bound, chunk, loop

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (flow-pl .*)$", README, re.MULTILINE)
TARGETS = re.findall(r"^    make (\w+)", README, re.MULTILINE)


def test_commands(tmp_path, monkeypatch):
    """In the order of the README, in an empty folder with the configurations, each fit cut to a round or two."""
    assert len(COMMANDS) >= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOW_PL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    x = np.random.default_rng(0).integers(0, 256, size=(600, 28, 28), dtype=np.uint8)
    np.savez(
        tmp_path / "wide.npz", x=np.eye(20)[np.arange(600) % 20], y=np.arange(600) % 3, client=np.arange(600) // 15
    )
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(600) % 62, client=np.arange(600) // 15)
    for command in COMMANDS:
        args = shlex.split(command)[1:]
        if args[0] == "compare":
            args = smaller_comparison(command)
        if args[0] == "fit":
            args += [
                "--trainer.max_epochs",
                "2" if "--ckpt_path" in args else "1",
                "--trainer.check_val_every_n_epoch=1",
            ]
        if "--print_config" in args:
            with pytest.raises(SystemExit) as stop:
                main(args)
            assert stop.value.code == 0
        else:
            main([*args, "--trainer.accelerator=cpu", "--trainer.devices=1"])
        if "configs/loggers/wandb.yaml" in args:
            wandb.finish()  # a later logger of this process would go on with the same run
    assert (tmp_path / "runs" / "digits" / "flow" / "predictions.csv").exists()
    assert (tmp_path / "runs" / "digits" / "flow" / "checkpoints" / "best.ckpt").exists()
    assert (tmp_path / "runs" / "compare" / "digits" / "table.md").exists()
    assert (tmp_path / "runs" / "compare" / "array" / "ablations" / "accuracy.png").exists()


def smaller_comparison(command):
    """Its words, with two configurations and one seed, for a round."""
    words = shlex.split(re.sub(r"--seeds (\d+)[ \d]*", r"--seeds \1 ", command))[1:]
    files = [[word] if "*" not in word else sorted(glob.glob(word))[:2] for word in words]
    return [*chain(*files), "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(TARGETS)
    for target in TARGETS:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_method_shown_is_the_one_shipped():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = dict(vars(flow_pl.methods))
    exec(code, names)
    batch, results = chunk((9, 5), heldout=10), []
    for cls in (FineTuning, names["FineTuning"]):
        method = bound(cls(2))
        results.append(evaluate_clients(loop(), method, server_groups(method), batch))
    assert torch.equal(results[0].personalized_loss, results[1].personalized_loss)


@pytest.mark.parametrize("folder", ["digits", "synthetic", "array"])
def test_the_table_of_configurations_is_complete(folder):
    assert f"`configs/{folder}`" in README
    shipped = {path.stem for path in (ROOT / "configs" / folder).glob("*.yaml")}
    table = README.split("### Methods")[1].split("###")[0]
    assert shipped == {*re.findall(r"^\| `(\w+)` \| `\w+` \|", table, re.MULTILINE), "flow_published"}
