"""A run in a process of its own: fit, from where it was interrupted, then test.

The other processes of a run on several devices are started by Lightning, as `python -m flow_pl.compare.worker FOLDER
CHECKPOINT`.
"""

from __future__ import annotations

import _thread
import importlib.util
import os
import signal
import sys
import threading
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from flow_pl.cli import run
from flow_pl.utils.told import told


def train_and_test(folder: str, checkpoint: str) -> None:
    """Fit to the end, and test a checkpoint; see `flow_pl.compare.runs.Run` for the files.

    Args:
        folder: of the run, with its settings.
        checkpoint: which one is tested, "last" or "best".
    """
    config = ["--config", str(Path(folder, "config.yaml"))]
    checkpoints = Path(folder, "checkpoints")
    last = checkpoints / "last.ckpt"
    with told():
        run(["fit", *config, *(["--ckpt_path", str(last)] if last.exists() else [])])
        run(["test", *config, "--ckpt_path", str(checkpoints / f"{checkpoint}.ckpt")])


def work(
    folder: str, checkpoint: str, log: str, environment: dict[str, str], one_thread: bool, alive: Connection
) -> None:
    """What the process of a run does.

    Args:
        folder: of the run.
        checkpoint: which one is tested.
        log: file that gets everything it says.
        environment: variables of the command's own process: a fork server has those of its start.
        one_thread: compute in one thread, beside other runs.
        alive: the run stops when the other end is closed, also because the process that had it is no more.
    """
    os.environ.clear()
    os.environ.update(environment)
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal is for the command, which stops its runs; they end as a group
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if one_thread:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a command in the background of a shell ignores it
    threading.Thread(target=_stop_with, args=(alive,), daemon=True).start()
    # what Lightning starts again for other devices
    sys.argv = [__file__, folder, checkpoint]
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("flow_pl.compare.worker")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    train_and_test(folder, checkpoint)


def _stop_with(alive: Connection) -> None:
    try:
        alive.recv()
    except (EOFError, OSError):
        while True:
            # again and again: one may be lost where exceptions are ignored; Lightning, once told, ignores the others
            _thread.interrupt_main()
            time.sleep(0.2)


if __name__ == "__main__":
    train_and_test(*sys.argv[1:])
