"""A Flower network on this machine: a SuperLink and SuperNodes on free ports, which end with the block."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Network:
    """Args: folder of logs and states; everything that is started has a process group of its own."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.home = self.folder / "home"
        self.port = free_port()
        self.processes = {}
        self.environment = {
            **os.environ,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": str(self.home),
            "FLOW_PL_CACHE": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    def __enter__(self):
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.start_superlink()
        return self

    def __exit__(self, *error):
        for name in list(self.processes):
            self.stop(name)

    def start_superlink(self, *options):
        self.start(
            "superlink",
            *("flower-superlink", "--insecure", "--disable-runtime-dependency-installation"),
            *("--port", str(self.port), *options),
        )
        wait_for_port(self.port)

    def start_node(self, number, config=""):
        self.start(
            f"node-{number}",
            *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())),
            *("--node-config", f'partition-id={number} state="{self.folder}/state-{number}" {config}'),
        )

    def start(self, name, *command):
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self, name, how=signal.SIGTERM):
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, app, **config):
        """Start an app and give its run's number back."""
        options = " ".join(f"{key.replace('_', '-')}={value!r}".replace("'", '"') for key, value in config.items())
        options = options.replace("=True", "=true").replace("=False", "=false")
        return re.search(r"started run (\d+)", self.flwr("run", str(app), "--run-config", options))[1]

    def run_log(self, run):
        """What the app's server has printed in a run."""
        return self.flwr("log", run, "--show")

    def flwr(self, *arguments):
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments],
            cwd=self.folder,
            env={**self.environment, "COLUMNS": "1000"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def log(self, name="superlink"):
        return (self.folder / f"{name}.log").read_text(errors="replace")


def wait_for_port(port, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on port {port} after {seconds} seconds")


def wait_for_file(path, seconds, network):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} is not there: {network.log()[-3000:]}"
        time.sleep(0.5)
