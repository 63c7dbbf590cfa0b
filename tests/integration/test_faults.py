"""What fails around a run: disks, folders, workers and processes. It ends with a message, and keeps what was saved."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from flow_pl.__main__ import main
from flow_pl.utils.checkpoints import look_at
from tests.test_cli import config, fails  # noqa: F401 (a fixture)
from tests.utils.test_checkpoints import disk  # noqa: F401 (a fixture)
from tools.chaos.__main__ import main as chaos
from tools.chaos.runs import Chain, kill_group
from tools.chaos.soak import Usage, failures

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=4"]


def last_round(root):
    return look_at(root / "checkpoints" / "last.ckpt")["global_step"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--trainer.default_root_dir=/proc/nowhere", "/proc/nowhere"),
        ("--data.cache_dir=/proc/nowhere", "the client store /proc/nowhere/"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_told_at_once(config, capsys, setting, message):  # noqa: F811
    """Nobody may write to /proc, not even root."""
    code, error = fails(capsys, "fit", "--config", config, *QUIET, setting)
    assert code == 1
    assert message in error
    assert "cannot be written" in error
    assert "Traceback" not in error


class Fill(Callback):
    """Fills a disk behind the second round."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer, *_):
        if trainer.current_epoch == 2:
            with contextlib.suppress(OSError), open(f"{self.folder}/filling", "wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 512)


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_last_round_to_go_on_from(config, capsys, disk):  # noqa: F811
    root = disk / "run"
    words = ["--config", config, *QUIET, f"--trainer.default_root_dir={root}"]
    fill = ["--trainer.callbacks+=tests.integration.test_faults.Fill", f"--trainer.callbacks.folder={disk}"]
    code, error = fails(capsys, "fit", *words, *fill)
    assert code == 1
    assert f"error: {root}" in error
    assert "cannot be written (No space left on device): free space" in error
    assert "Traceback" not in error
    assert last_round(root) == 2
    (disk / "filling").unlink()
    main(["fit", *map(str, words), "--ckpt_path", "last"])
    assert last_round(root) == 4


class KillWorker(Callback):
    """Kills a process that loads data, in the third round."""

    def on_train_epoch_start(self, trainer, *_):
        if trainer.current_epoch == 2:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told(config, tmp_path, capsys):  # noqa: F811
    kill = "--trainer.callbacks+=tests.integration.test_faults.KillWorker"
    workers = ["--data.num_workers=1", "--data.chunk_size=1"]
    code, error = fails(capsys, "fit", "--config", config, *QUIET, kill, *workers)
    assert code == 1
    assert "error: a data-loading worker was killed" in error
    assert "--ckpt_path last resumes" in error
    assert last_round(tmp_path / "run") == 2
    main(["fit", "--config", str(config), *QUIET, "--ckpt_path", "last"])
    assert last_round(tmp_path / "run") == 4


def _children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


def _gone(pid):
    """Ended; as a zombie, if nobody has waited for it."""
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    return True


@pytest.mark.slow
@pytest.mark.parametrize("who", [pytest.param("first", marks=pytest.mark.extended), "second"])
def test_a_process_that_is_killed_ends_the_others(tmp_path, who):
    """Not with a wait for what never comes; a resumed run is whole again."""
    chain = Chain(tmp_path, "apfl", processes=2, rounds=100_000)
    process = chain.launch("run", "fit")
    try:
        deadline = time.monotonic() + 120
        while not chain.checkpoint("run").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        children = _children(process.pid)
        assert len(children) == 1, chain.log("run")[-2000:]
        os.kill(process.pid if who == "first" else children[0], signal.SIGKILL)
        assert process.wait(60) != 0
        deadline = time.monotonic() + 60
        while not _gone(children[0]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _gone(children[0])
    finally:
        kill_group(process)
    reached = last_round(tmp_path / "run" / "run")
    chain.rounds = reached + 2
    chain.finish("run", "fit", "--ckpt_path", "last")
    assert last_round(tmp_path / "run" / "run") == reached + 2
    states = torch.load(chain.checkpoint("run"), weights_only=True)["client_states"]
    assert len(states["rows"]) == len(states["clients"]) > 0


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    """A short `make chaos`: the first kill hits the writing of the clients, the second one the start."""
    words = ["--kills=3", "--rounds=12", "--method=flow", "--processes=1", f"--folder={tmp_path}"]
    assert chaos(words) == 0


def _usages(memory=lambda n: 100, files=lambda n: 9, log=lambda n: 10 * n, disk=lambda n: 50):  # noqa: F811
    return [Usage(n, memory(n), files(n), log(n), disk(n), float(n)) for n in range(100, 2001, 100)]


@pytest.mark.parametrize(
    ("usages", "words"),
    [
        (_usages(), None),
        (_usages(memory=lambda n: min(n, 300)), None),
        (_usages(memory=lambda n: 1000 + n / 50), "memory grows by"),
        (_usages(files=lambda n: 9 + n // 500), "open files: 9, later 13"),
        (_usages(log=lambda n: n * n), "the log grows by"),
        (_usages(disk=lambda n: 50 + 20 * n), None),  # two checkpoints with the rows of the log
        (_usages(disk=lambda n: 50 + 30 * n), "checkpoints grow"),
    ],
)
def test_what_the_soak_finds(usages, words):
    found = "; ".join(failures(usages))
    assert (words in found) if words else not found
