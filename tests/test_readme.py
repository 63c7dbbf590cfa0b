"""Every command and every piece of code in the README runs, and its tables are those of the code."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import flow_pl.methods
from flow_pl import shipped
from flow_pl.__main__ import main
from flow_pl.cli import run
from flow_pl.engine.server_round import server_groups
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FineTuning
from tests.support import bound, chunk, loop
from tools import configs_page

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (flow-pl .*)$", README, re.MULTILINE)
TARGETS = set(re.findall(r"`make ([\w-]+)`", README))


@pytest.mark.slow
def test_commands(tmp_path, monkeypatch):
    """In the order of the README, in an empty folder, each fit cut to a round."""
    assert len(COMMANDS) >= 7
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOW_PL_CACHE", str(tmp_path / "cache"))
    x = np.random.default_rng(0).integers(0, 256, size=(600, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(600) % 62, client=np.arange(600) // 15)
    short = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    for command in COMMANDS:
        args = shlex.split(command)[1:]
        if args[0] == "compare":
            at = args.index("--methods")
            after = next(i for i in range(at + 1, len(args)) if args[i].startswith("--"))
            # one seed or path is enough, and one or two of the methods
            args = [*args[:at], "--methods", "method/f*g.yaml", *args[after : after + 2], *short]
        elif args[0] == "fit":
            args += short
        if "--print_config" in args:
            with pytest.raises(SystemExit) as stop:
                main(args)
            assert stop.value.code == 0
        else:
            main([*args, "--trainer.accelerator=cpu", "--trainer.devices=1"])
    assert (tmp_path / "runs" / "digits" / "flow" / "predictions.csv").exists()
    assert (tmp_path / "runs" / "digits" / "flow-routing_hard" / "checkpoints" / "best.ckpt").exists()
    assert all((tmp_path / "runs" / "compare" / task / "table.md").exists() for task in ("digits", "array"))


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "test-slow", "lint"} <= TARGETS
    for target in TARGETS:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_method_shown_is_the_one_shipped():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = dict(vars(flow_pl.methods))
    exec(code, names)
    batch, results = chunk((9, 5), heldout=10), []
    for cls in (FineTuning, names["FineTuning"]):
        method = bound(cls())
        results.append(evaluate_clients(loop(), method, server_groups(method), batch))
    assert torch.equal(results[0].personalized_loss, results[1].personalized_loss)


def test_the_table_of_methods_is_complete():
    table = README.split("## Methods")[1].split("## Extend")[0]
    listed = re.findall(r"^\| `(\w+)` \| `\w+` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(name.partition("/")[2] for name in shipped.names() if name.startswith("method/"))


def test_it_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 200


def test_the_page_of_configurations_is_that_of_the_files():
    """`python -m tools.configs_page` writes it anew."""
    assert configs_page.PAGE.read_text() == configs_page.page()


@pytest.mark.slow
def test_the_demo_has_the_numbers_shown(tmp_path, monkeypatch):
    """Sums are rounded differently on another processor, which 80 rounds amplify: up to three examples of the table."""
    monkeypatch.chdir(tmp_path)
    files = ["--config=task/digits", "--config=tuned/digits/flow", "--trainer.accelerator=cpu"]
    for command in ("fit", "test"):
        cli = run([command, *files, f"--trainer.default_root_dir={tmp_path}"])
    for kind in ("generalized", "personalized"):
        (shown,) = re.findall(rf"│ {kind} accuracy +│ +([\d.]+) │ +([\d.]+) │", README)
        for population, value, examples in zip(("seen", "new"), map(float, shown), (372, 85), strict=True):
            found = 100 * float(cli.trainer.callback_metrics[f"test/{population}/{kind}_accuracy"])
            assert found == pytest.approx(value, abs=300 / examples + 0.01), f"{kind}, {population}"
