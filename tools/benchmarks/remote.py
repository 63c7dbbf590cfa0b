"""Start contenders in their own processes, give them turns, and end them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

ROOT = Path(__file__).parents[2]
"""Folder of the repository."""
PATIENCE = 300.0
"""Seconds to wait for a round, including the start before the first one."""
GRACE = 20.0
"""Seconds for a contender to end by itself."""
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "PFL_PYTORCH_DEVICE": "cpu",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "TQDM_DISABLE": "1",
}
"""Environment of all contenders: on the CPU, without telemetry and progress bars."""


class RemoteError(Exception):
    """A contender could not be started, or failed in a round."""


@dataclass(frozen=True)
class Round:
    """Holds the cost of a contender's round.

    Attributes:
        seconds: duration of the round.
        processor_seconds: processor time of the contender's first process, without its child processes.
        memory_mb: peak memory of the contender's first process so far.
    """

    seconds: float
    processor_seconds: float
    memory_mb: float


class Remote:
    """Controls a contender with one or more processes; a context manager.

    Args:
        command: command of the contender.
        folder: folder of its log and model.
        processes: number of processes to start, which get torchrun's variables.
        environment: further environment variables.

    Attributes:
        start_seconds: seconds from the start of the process to the end of its first round; None before that.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, processes: int = 1, environment: Mapping[str, str] | None = None
    ) -> None:
        name = uuid4().hex
        self._model, self._log = folder / f"{name}.npy", folder / f"{name}.log"
        turns, self._turns = os.pipe()
        self._results, results = os.pipe()
        variables = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | {
            **ENVIRONMENT,
            **(environment or {}),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "BENCH_READ": str(turns),
            "BENCH_WRITE": str(results),
            "BENCH_MODEL": str(self._model),
        }
        if processes > 1:
            variables |= {"TORCHELASTIC_RUN_ID": name, "GROUP_RANK": "0"}
        self._begun = time.perf_counter()
        self.start_seconds: float | None = None
        self._buffer = b""
        with self._log.open("wb") as log:
            self._processes = [
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    pass_fds=(turns, results) if rank == 0 else (),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                for rank in range(processes)
            ]
        os.close(turns)
        os.close(results)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def round(self, settings: dict[str, Any]) -> Round:
        """Let the contender run a round.

        Raises:
            RemoteError: the contender failed, or took too long.
        """
        try:
            os.write(self._turns, (json.dumps(settings) + "\n").encode())
        except BrokenPipeError:
            raise self._failed("ended") from None
        deadline = time.perf_counter() + PATIENCE
        while b"\n" not in self._buffer:
            left = deadline - time.perf_counter()
            if left <= 0 or not select.select([self._results], [], [], left)[0]:
                raise self._failed(f"did not answer within {PATIENCE:g} seconds")
            piece = os.read(self._results, 1 << 12)
            if not piece:
                raise self._failed("ended")
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        if self.start_seconds is None:
            self.start_seconds = time.perf_counter() - self._begun
        return Round(**json.loads(line))

    def model(self) -> np.ndarray:
        """Return the parameters of the last saved round as one vector."""
        return np.load(self._model)

    def close(self) -> None:
        """End the contender; kill it with all processes of its sessions if it does not end by itself."""
        for descriptor in (self._turns, self._results):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _failed(self, how: str) -> RemoteError:
        log = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return RemoteError(f"it {how}; its log ends: " + "\n".join(log[-12:]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
