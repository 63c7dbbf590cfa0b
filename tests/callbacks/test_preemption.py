"""Signals to a run: it stops between two steps, with a checkpoint to go on from, and SLURM is asked to requeue."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from flow_pl.__main__ import main
from flow_pl.cli import run
from tests.callbacks.test_metrics_log import rows
from tests.test_cli import TINY, config  # noqa: F401 (a fixture)

ROUNDS = ["--trainer.max_epochs=4", "--data.chunk_size=2", "--trainer.enable_progress_bar=false"]


class Signal(Callback):
    """Sends a signal to its own process, once, in a round.

    Args:
        number: of the signal.
        round: in which round.
        hook: at which hook.
    """

    def __init__(self, number: int, round: int, hook: str) -> None:  # noqa: A002
        self.number, self.round, self.hook = number, round, hook
        setattr(self, hook, self._send)

    def _send(self, trainer, *_):
        if trainer.current_epoch + 1 == self.round and self.number:
            number, self.number = self.number, 0
            os.kill(os.getpid(), number)


def send(number, hook, round_=3):
    words = ["--trainer.callbacks+=tests.callbacks.test_preemption.Signal", f"--trainer.callbacks.number={int(number)}"]
    return [*words, f"--trainer.callbacks.round={round_}", f"--trainer.callbacks.hook={hook}"]


def weights(path):
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint["global_step"], torch.cat([p.flatten() for p in checkpoint["state_dict"].values()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that is left alone."""
    root = tmp_path_factory.mktemp("whole")
    (root / "tiny.yaml").write_text(TINY.format(root=root))
    run(["fit", "--config", str(root / "tiny.yaml"), *ROUNDS])
    return root / "run"


def check(root, whole):
    step, parameters = weights(root / "checkpoints" / "last.ckpt")
    assert step == 4
    assert torch.equal(parameters, weights(whole / "checkpoints" / "last.ckpt")[1])
    assert rows(root / "logs" / "version_0" / "metrics.csv") == rows(whole / "logs" / "version_0" / "metrics.csv")


@pytest.mark.parametrize(
    ("hook", "reached"),
    [
        ("on_train_batch_start", 2),  # in the first of two chunks: round 3 is given up
        # in the server's step: round 3 is completed
        pytest.param("on_before_optimizer_step", 3, marks=pytest.mark.slow),
        pytest.param("on_validation_batch_start", 3, marks=pytest.mark.slow),
        pytest.param("on_train_epoch_end", 3, marks=pytest.mark.slow),
    ],
)
def test_sigterm_stops_the_run_with_a_checkpoint_to_go_on_from(config, tmp_path, capsys, whole, hook, reached):  # noqa: F811
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), *ROUNDS, *send(signal.SIGTERM, hook)])
    assert stop.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: saved checkpoints are intact" in capsys.readouterr().err
    assert weights(tmp_path / "run" / "checkpoints" / "last.ckpt")[0] == reached
    main(["fit", "--config", str(config), *ROUNDS, "--ckpt_path", "last"])
    check(tmp_path / "run", whole)


SLURM = {"SLURM_JOB_ID": "123", "SLURM_JOB_NAME": "flow", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
SLURM |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}


def fake_scontrol(folder):
    """A command that notes what it is called with."""
    (folder / "bin").mkdir()
    script = folder / "bin" / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/called\n')
    script.chmod(0o755)
    return f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "hook",
    [
        "on_before_optimizer_step",
        *(pytest.param(hook, marks=pytest.mark.slow) for hook in ("on_train_batch_start", "on_validation_batch_start")),
    ],
)
def test_slurms_signal_saves_a_complete_round_and_requeues(config, tmp_path, monkeypatch, whole, hook):  # noqa: F811
    for name, value in {**SLURM, "PATH": fake_scontrol(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    words = ["fit", "--config", str(config), *ROUNDS]
    # SLURM then ends the job
    with pytest.raises(SystemExit):
        main([*words, *send(signal.SIGUSR1, hook, 2), *send(signal.SIGTERM, "on_train_batch_start", 4)])
    assert (tmp_path / "called").read_text() == "requeue 123\n"
    assert weights(tmp_path / "run" / "hpc_ckpt_1.ckpt")[0] == 2
    assert weights(tmp_path / "run" / "checkpoints" / "last.ckpt")[0] == 3
    main(words)  # the same command
    check(tmp_path / "run", whole)


def _tasks(folder, tasks, *words):
    """A command as SLURM starts it: one process for each task."""
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(root=folder).replace("devices: 1", f"devices: {tasks}\n  strategy: ddp"))
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, **SLURM, "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    env |= {"SLURM_NTASKS": str(tasks), "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_JOB_ID": str(os.getpid())}
    command = [sys.executable, "-m", "flow_pl", "fit", "--config", str(path), "--trainer.max_epochs=2000", *words]
    started = []
    for task in range(tasks):
        env |= {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}
        with (folder / f"log{task}.txt").open("wb") as log:
            started.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log))
    return started


def _until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.mark.slow
def test_two_processes_act_together_when_one_is_sent_a_signal(tmp_path, monkeypatch):
    """The second one gets each signal, SIGUSR1 first; the first one saves, requeues, and both end."""
    monkeypatch.setenv("PATH", fake_scontrol(tmp_path))
    tasks = _tasks(tmp_path, 2, "--trainer.enable_progress_bar=false")
    try:
        last, saved = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "run" / "hpc_ckpt_1.ckpt"
        _until(last.exists)
        tasks[1].send_signal(signal.SIGUSR1)
        _until((tmp_path / "called").exists)
        assert weights(saved)[0] >= 1
        tasks[1].send_signal(signal.SIGTERM)
        assert [task.wait(60) for task in tasks] == [128 + signal.SIGTERM] * 2
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    assert (tmp_path / "called").read_text() == f"requeue {os.getpid()}\n"
    assert weights(last)[0] >= weights(saved)[0]
