"""Measure the time of the command line from the start of its process to the end of a one-round run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from statistics import median

from tools.benchmarks.remote import ROOT

CONFIGS = ("-c", "task/digits", "-c", "tuned/digits/flow")


def first_round(repetitions: int = 3) -> dict[str, float]:
    """Run `flow-pl fit` for one round without validation, with an existing store.

    Returns:
        Medians of the duration of the process and of its processor time, which does not grow on a busy machine.

    Args:
        repetitions: number of runs, after one that writes the store.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "flow_pl", "fit", *CONFIGS, "--trainer.max_epochs", "1"]
        command += ["--trainer.limit_val_batches", "0", "--trainer.default_root_dir", folder]
        environment = {**os.environ, "FLOW_PL_CACHE": folder, "OMP_NUM_THREADS": "1"}
        wall, processor = [], []
        for _ in range(1 + repetitions):
            start, before = time.perf_counter(), os.times()
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
            after = os.times()
            wall.append(time.perf_counter() - start)
            used = (after.children_user - before.children_user, after.children_system - before.children_system)
            processor.append(sum(used))
    return {"start_seconds": median(wall[1:]), "start_processor_seconds": median(processor[1:])}
