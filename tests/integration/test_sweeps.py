"""The sweeps of Weights & Biases: the command that the real agent builds from a drawn combination parses and runs."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from wandb import wandb_agent
from wandb.apis.public import sweeps
from wandb.sdk.launch.sweeps.utils import load_sweep_config

from flow_pl.cli import run
from flow_pl.shipped import find, names
from tests.test_cli import TINY
from tests.test_configs import ROOT
from tests.wandb_files import offline_runs

_validate_config_and_fill_distribution = getattr(sweeps, "_validate_config_and_fill_distribution", None)
if _validate_config_and_fill_distribution is None:
    pytest.skip("this version of W&B does not check a sweep by itself", allow_module_level=True)

SWEEPS = sorted((ROOT / "configs" / "sweep").glob("*.yaml"))
FAST = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.fast_dev_run=true"]


def draw(parameter, high):
    """The first or the last value, the smallest or the largest."""
    if "values" in parameter:
        return parameter["values"][-1 if high else 0]
    return parameter["max" if high else "min"]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Has the real agent start one run; returns the command it starts and its environment."""
    # the agent writes its drawing under this folder, and sets these variables in its own environment
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep001")
    started = []

    def process(command=None, env=None, **_):
        started.append((command, env))
        return SimpleNamespace()

    monkeypatch.setattr(wandb_agent, "AgentProcess", process)

    def call(sweep, drawn, order=list):
        agent = wandb_agent.Agent(api=None, queue=None)
        agent._sweep_command = list(sweep["command"])
        values = json.loads(
            json.dumps({name: {"value": drawn[name]} for name in order(drawn)})
        )  # as the server sends them
        agent._command_run({"run_id": "run00001", "program": sweep.get("program", "flow-pl"), "args": values})
        return started.pop()

    return call


def arguments(command):
    """What `flow-pl` gets."""
    assert command[:2] == ["/usr/bin/env", "flow-pl"]
    return command[2:]


def setting(config, name):
    """The value of a setting that is given by the short form of its name, without `init_args`."""
    for key in name.split("."):
        config = (config if key in config else config["init_args"])[key]
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("high", "order"), [(False, list), (True, sorted)], ids=["low as written", "high sorted"])
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_drawn_combination_runs(start, tmp_path, monkeypatch, path, high, order):
    """One round on the real data, with every drawn value in its place, in whatever order the server sends them."""
    monkeypatch.chdir(ROOT)
    sweep = load_sweep_config(path)
    drawn = {name: draw(parameter, high) for name, parameter in sweep["parameters"].items()}
    args = arguments(start(sweep, drawn, order)[0])
    cli = run([*args, *FAST, f"--trainer.default_root_dir={tmp_path}", f"--data.cache_dir={tmp_path}"])
    assert sweep["metric"]["name"] in cli.trainer.callback_metrics
    settings = cli.config["fit"].as_dict()
    if "config" in drawn:
        config = yaml.safe_load(find(drawn.pop("config")).read_text())
        assert type(cli.model.method).__name__ == config["model"]["method"]["class_path"]
    assert {name: setting(settings, name) for name in drawn} == drawn
    assert settings["model"]["loop"]["init_args"]["client_optimizer"]["init_args"]["momentum"] == 0.9, "as configured"
    assert settings["trainer"]["default_root_dir"] == str(tmp_path / "sweeps" / "sweep001" / "run00001")


def test_awkward_values(start, tmp_path):
    """As Python prints them: 1e-05 is a string in YAML 1.1; lists have blanks; whole numbers stand for fractions."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(root=tmp_path))
    drawn = {
        "model.method.regularization": 1e-05,
        "model.method.init_args.router_lr_scale": 2e-10,
        "model.loop.client_optimizer.lr": 1e-05,
        "model.method.router.hidden": [6, 4],
        "model.method.router.dropout": 0,
        "model.method.adapt_router": False,
        "data.shared_fraction": 1.5e-07,
        "data.cohort_size": 2,
        "model.method.split": "cross",
    }
    command, _ = start({"command": ["${env}", "${program}", "fit", f"--config={config}", "${args}", *FAST]}, drawn)
    assert {"--model.method.regularization=1e-05", "--model.method.router.hidden=[6, 4]"} < set(command)
    cli = run(arguments(command))
    method = cli.model.method
    assert (method.regularization, method.router_lr_scale, method.adapt_router, method.split) == (
        1e-05,
        2e-10,
        False,
        "cross",
    )
    assert [layer.out_features for layer in cli.model.server["router"].exits.layers] == [6, 4]
    assert cli.model.loop.client_optimizer([torch.zeros(1)]).defaults["lr"] == 1e-05
    settings = cli.config["fit"].as_dict()
    assert {name: setting(settings, name.replace(".init_args", "")) for name in drawn} == drawn


@pytest.mark.slow
def test_the_agents_own_command(start, tmp_path):
    """In a process of its own, on tiny data: the run logs the metric, under the agent's id and in its own folder."""
    sweep = load_sweep_config(ROOT / "configs" / "sweep" / "flow_bayes.yaml")
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(root=tmp_path))
    sweep["command"] = [part for part in sweep["command"] if part != "--config=tuned/digits/flow"]
    sweep["command"] = [part.replace("task/digits", str(config)) for part in sweep["command"]]
    sweep["command"] += [f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.offline=true"]
    drawn = {name: draw(parameter, high=False) for name, parameter in sweep["parameters"].items()}
    command, env = start(sweep, drawn)
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env.pop("WANDB_SERVICE", None)  # that of this process, if W&B has run in it, would keep the run open
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (logged,) = offline_runs(tmp_path)
    assert logged.id == "run00001"
    assert logged.sweep == "sweep001"
    assert {name: logged.config[name] for name in drawn} == drawn
    assert [row["trainer/global_step"] for row in logged.rows(sweep["metric"]["name"])] == [1, 2]
    assert (tmp_path / "run" / "sweeps" / "sweep001" / "run00001" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_are_well_formed(path):
    """By W&B's own checks, and by those that it makes on the server, where its `sweeps` package is installed."""
    sweep = load_sweep_config(path)
    assert _validate_config_and_fill_distribution(sweep) == sweep, "every distribution is said"
    configs = sweep["parameters"].get("config", {}).get("values", [])
    configs += [part.removeprefix("--config=") for part in sweep["command"] if part.startswith("--config=")]
    assert configs
    for config in configs:
        assert find(config).exists()
    for parameter in sweep["parameters"].values():
        for value in (parameter.get("min"), parameter.get("max"), *parameter.get("values", [])):
            with pytest.raises((ValueError, TypeError)):  # a number that YAML 1.1 takes for a string, as 1e-05
                float(value if isinstance(value, str) else "word")
    sweeps = pytest.importorskip("sweeps", reason="wandb[sweeps] is not installed")
    assert sweeps.schema_violations_from_proposed_config(sweep) == []


def test_no_method_is_forgotten():
    listed = yaml.safe_load((ROOT / "configs" / "sweep" / "methods.yaml").read_text())["parameters"]["config"]["values"]
    shipped = {name for name in names() if name.startswith("method/")}
    assert set(listed) == shipped
    assert len(listed) == len(shipped)
