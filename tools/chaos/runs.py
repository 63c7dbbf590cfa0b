"""Run a small run in its own process group, kill it and resume it."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tools.chaos.stages import stage

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 400
TIMEOUT_S = 600
AIMED = 4
"""One in this many kills waits for a half-written checkpoint file."""

CONFIG = """
seed_everything: 1
trainer:
  max_epochs: {rounds}
  check_val_every_n_epoch: 2
  accelerator: cpu
  devices: {processes}
  strategy: {strategy}
  default_root_dir: {root}/run
  enable_progress_bar: false
  callbacks:
    - class_path: tools.chaos.stages.Stages
      init_args: {{path: {root}/stage}}
    - class_path: ResultsTable
      init_args: {{path: {root}/test.json}}
data:
  class_path: SyntheticData
  init_args:
    num_clients: 24
    num_features: 6
    num_classes: 3
    mean_log_size: 2.0
    sigma_log_size: 0.3
    min_size: 8
    max_size: 20
    cohort_size: 6
    chunk_size: 2
    new_client_fraction: 0.25
    cache_dir: {root}/cache
model:
  backbone:
    class_path: MLP
    init_args: {{in_features: 6, num_classes: 3, hidden: [8]}}
  loop:
    class_path: FederatedLoop
    init_args:
      batch_size: 4
      client_optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.05, momentum: 0.9}}}}
  server_optimizer: {{class_path: torch.optim.Adam, init_args: {{lr: 0.005}}}}
  server_scheduler: {{class_path: torch.optim.lr_scheduler.StepLR, init_args: {{step_size: 50, gamma: 0.9}}}}
  method: {method}
"""

METHODS = {
    "flow": "{class_path: Flow, init_args: {router: {class_path: InstanceRouter, "
    "init_args: {hidden: [4], dropout: 0.3}}}}",
    "apfl": "{class_path: APFL, init_args: {alpha: 0.25}}",
}


@dataclass
class Chain:
    """Controls a run that is killed and resumed until it ends, and an undisturbed one.

    Attributes:
        folder: folder of both runs.
        method: "flow" or "apfl".
        processes: number of processes.
        rounds: number of rounds of the run.
        kills: number of kills by stage of the run.
    """

    folder: Path
    method: str
    processes: int
    rounds: int = ROUNDS
    kills: Counter[str] = field(default_factory=Counter)

    def launch(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """Start a command of a run in its own process group."""
        root = self.folder / name
        root.mkdir(parents=True, exist_ok=True)
        strategy = "ddp" if self.processes > 1 else "auto"
        settings = {"rounds": self.rounds, "processes": self.processes, "strategy": strategy, "root": root}
        config = root / "run.yaml"
        config.write_text(CONFIG.format(**settings, method=METHODS[self.method]))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "flow_pl", words[0], "--config", str(config), *words[1:]]
        with (root / "log.txt").open("ab") as log:
            return subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log, start_new_session=True)

    def checkpoint(self, name: str, which: str = "last") -> Path:
        """Return the file of a checkpoint."""
        return self.folder / name / "run" / "checkpoints" / f"{which}.ckpt"

    def finish(self, name: str, *words: str, timeout_s: float = TIMEOUT_S) -> None:
        """Run a command until it ends.

        Raises:
            RuntimeError: the command failed, or hangs.
        """
        process = self.launch(name, *words)
        try:
            status: int | str = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = "none: it hangs"
        finally:
            kill_group(process)
        if status != 0:
            raise RuntimeError(f"{name}: exit status {status}\n{self.log(name)[-3000:]}")

    def log(self, name: str) -> str:
        """Return the output of a run."""
        return (self.folder / name / "log.txt").read_text(errors="replace")

    def undisturbed(self) -> float:
        """Run all rounds without a kill, and the test.

        Returns:
            Duration of the rounds in seconds.
        """
        self.finish("whole", "fit")
        start = (self.folder / "whole" / "run" / "logs" / "version_0" / "config.yaml").stat().st_mtime
        end = self.checkpoint("whole").stat().st_mtime
        self.finish("whole", "test", "--ckpt_path", str(self.checkpoint("whole")))
        return end - start

    def kill_repeatedly(self, seed: int, mean_s: float, at_least: int) -> None:
        """Kill the run at random moments and resume it, often enough; then let it end, and test.

        Args:
            seed: seed of the moments.
            mean_s: mean time from a run's first new round to its kill.
            at_least: smallest number of kills.
        """
        moments = random.Random(seed)
        while self.kills.total() < at_least:
            process = self.launch("killed", "fit", "--ckpt_path", "last")
            try:
                kind = self._kill(process, moments, mean_s)
            finally:
                kill_group(process)
            if kind is None:
                if process.returncode != 0:
                    raise RuntimeError(f"exit status {process.returncode}\n{self.log('killed')[-3000:]}")
                break  # it has ended
            self.kills[kind] += 1
        self.finish("killed", "fit", "--ckpt_path", "last")
        self.finish("killed", "test", "--ckpt_path", str(self.checkpoint("killed")))

    def _kill(self, process: subprocess.Popen[bytes], moments: random.Random, mean_s: float) -> str | None:
        """Kill a run at a random moment; return its stage, None if it ended before."""
        number = self.kills.total()
        root, last = self.folder / "killed", self.checkpoint("killed")
        part = last.with_name(".last.ckpt.part")
        for left in (part, root / "stage"):  # left by the previous kill
            left.unlink(missing_ok=True)
        before = last.stat().st_mtime_ns if last.exists() else 0
        delay = moments.expovariate(1 / mean_s)

        def resumed() -> bool:
            return last.exists() and last.stat().st_mtime_ns != before

        deadline = time.monotonic() + TIMEOUT_S
        if number == 0:  # while the clients are written
            _wait(process, lambda: any((root / "cache").glob(".*.tmp")), deadline)
        elif number % 10 == 1:  # while it starts, before its first checkpoint at first
            _wait(process, lambda: (root / "run" / "logs").exists(), deadline)
            time.sleep(moments.uniform(0, 1))
        else:
            _wait(process, resumed, deadline)
            _wait(process, lambda: False, time.monotonic() + delay)
            if number % AIMED == 0:
                _wait(process, part.exists, deadline)
        if process.poll() is not None:
            return None
        kill_group(process)
        unfinished = list((root / "cache").glob(".*.tmp"))
        for folder in unfinished:
            shutil.rmtree(folder)
        if unfinished:
            return "store"
        return "checkpoint" if part.exists() else stage(root / "stage")

    def differences(self) -> list[str]:
        """Return the differences of the killed run from the undisturbed one; there should be none."""
        found = []
        for which in ("last", "best"):
            whole, killed = (load(self.checkpoint(name, which)) for name in ("whole", "killed"))
            found += [f"{which}.ckpt: {key}" for key in KEYS if not identical(whole.get(key), killed.get(key))]
        if load(self.checkpoint("whole"))["global_step"] != self.rounds:
            found.append("rounds")
        tests = [json.loads((self.folder / name / "test.json").read_text()) for name in ("whole", "killed")]
        if tests[0] != tests[1]:
            found.append("metrics of the test")
        whole_log, killed_log = (rows(self.folder / name / "run" / "logs") for name in ("whole", "killed"))
        if whole_log != killed_log:
            found.append(f"metrics.csv: {len(whole_log)} rows and {len(killed_log)}")
        steps = [int(row["step"]) for row in killed_log if row["train/clients"]]
        if steps != list(range(1, self.rounds + 1)):
            found.append("rounds in metrics.csv")
        return found


KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "client_states", "epoch", "global_step", "loops")
"""Compared keys of a checkpoint; the others depend on files and time."""


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a run with all its processes, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows(logs: Path) -> list[dict[str, str]]:
    """Return the metrics of the fit: those of the last version with rounds, since a test creates a version, too."""
    found: list[dict[str, str]] = []
    for path in sorted(logs.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            table = list(csv.DictReader(file))
        found = table if table and "train/clients" in table[0] else found
    return found


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def identical(a: Any, b: Any) -> bool:
    """Return whether two parts of checkpoints are equal, bit by bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


def _wait(process: subprocess.Popen[bytes], condition: Any, deadline: float) -> None:
    """Wait until the condition holds, the process has ended, or the deadline has passed."""
    while time.monotonic() < deadline and process.poll() is None and not condition():
        time.sleep(0.0005)
