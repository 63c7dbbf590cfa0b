"""Execute a run in a process of its own: fit, resuming if it was interrupted, unless it has ended; then test.

Lightning starts the other processes of a run on several devices, as `python -m flow_pl.compare.worker FOLDER
CHECKPOINT`; without a checkpoint nothing is tested.
"""

from __future__ import annotations

import _thread
import importlib.util
import json
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
from flow_pl.compare.runs import DATA, STARTED, TRAINED
from flow_pl.utils.exit_messages import exit_with_message
from flow_pl.utils.files import write_text


def train_and_test(folder: str, checkpoint: str | None = None) -> None:
    """Fit to the end, once, and test a checkpoint, if one is named; see `flow_pl.compare.runs.Run` for the files.

    Args:
        folder: folder of the run, with its settings.
        checkpoint: the checkpoint to test, "last" or "best"; None for no test.
    """
    config = ["--config", str(Path(folder, "config.yaml"))]
    checkpoints = Path(folder, "checkpoints")
    last, started, trained = checkpoints / "last.ckpt", Path(folder, STARTED), Path(folder, TRAINED)
    with exit_with_message():
        # Lightning would go on with a fit that has ended before its last round, as by EarlyStopping
        if not (last.exists() and trained.exists() and trained.read_bytes() == started.read_bytes()):
            fit = run(["fit", *config, *(["--ckpt_path", str(last)] if last.exists() else [])])
            if fit.trainer.is_global_zero:  # an interrupted fit does not come here: it raises
                record = fit.model.data_record() or {}
                known = {name: record[name] for name in ("rows", "split") if name in record}
                write_text(Path(folder, DATA), json.dumps(known) + "\n")
                write_text(trained, started.read_text(encoding="utf-8"))
        if checkpoint is not None:
            run(["test", *config, "--ckpt_path", str(checkpoints / f"{checkpoint}.ckpt")])


def work(
    folder: str, checkpoint: str | None, log: str, environment: dict[str, str], one_thread: bool, alive: Connection
) -> None:
    """Execute a run in the current process.

    Args:
        folder: folder of the run.
        checkpoint: the checkpoint to test; None for no test.
        log: file that receives all output.
        environment: environment variables of the command's process; a fork server still has those of its start.
        one_thread: whether to compute in one thread, beside other runs.
        alive: the run stops when the other end is closed, also by the end of the process that held it.
    """
    os.environ.clear()
    os.environ.update(environment)
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C should reach only the command, which stops its runs as groups
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if one_thread:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes background commands ignore it
    threading.Thread(target=_stop_with, args=(alive,), daemon=True).start()
    # what Lightning launches for other devices
    sys.argv = [__file__, folder, *([] if checkpoint is None else [checkpoint])]
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("flow_pl.compare.worker")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    train_and_test(folder, checkpoint)


def _stop_with(alive: Connection) -> None:
    try:
        alive.recv()
    except (EOFError, OSError):
        while True:
            # repeat: an interrupt is lost where exceptions are ignored; Lightning ignores all after the first
            _thread.interrupt_main()
            time.sleep(0.2)


if __name__ == "__main__":
    train_and_test(*sys.argv[1:])
