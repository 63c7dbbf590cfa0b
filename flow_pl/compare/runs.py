"""One run of a comparison or a search: its folder, its state and its results."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from flow_pl.compare.settings import Settings, run_settings
from flow_pl.errors import ConfigurationError
from flow_pl.results.run_folder import CONFIG_HEADER
from flow_pl.results.runs import Client, RunResults, read_curve, read_table
from flow_pl.resume import NO_EFFECT
from flow_pl.utils.files import write_text
from flow_pl.version import __version__

NOT_TRAINING = (
    "default_root_dir",
    "enable_model_summary",
    "enable_progress_bar",
    "log_every_n_steps",
    "logger",
    "num_sanity_val_steps",
    "profiler",
)
"""Settings of the trainer that only determine what is shown and where."""

STARTED = "started.json"
"""File in a run's folder with a digest of its settings."""

TRAINED = "trained.json"
"""Copy of that file, written when the fit has ended."""

DATA = "data.json"
"""File in a run's folder with digests of the rows and the split that it was trained on."""

State = Literal["new", "changed", "interrupted", "done"]
"""Not started; made with other settings or another version; unfinished or tested with another checkpoint; done."""


@dataclass(frozen=True, eq=False)
class Run:
    """A method trained and tested with one seed, or only trained and validated.

    Besides checkpoints and logs, the folder holds `started.json`, a digest of the settings; its copy `trained.json`,
    when the fit has ended, so that only the test is repeated; `data.json`, digests of the data; `config.yaml`, the
    settings, from which the run can be repeated; `log.txt`, its output; and its measurements. `results.json` is written
    last: a run is done when that file exists and its digest matches the settings.

    Attributes:
        method: name of the method, the stem of its configuration file.
        seed: seed of everything random except the split.
        folder: folder of this run only.
        settings: settings of the method.
        checkpoint: the checkpoint to test, "last" or "best"; None to test nothing and keep no checkpoints.
        group: name of the comparison.
        split: seed of the federation's split, also contained in `settings`; None for the task's own.
        variant: what distinguishes runs of a method with other settings, for display.
    """

    method: str
    seed: int
    folder: Path
    settings: Settings
    checkpoint: str | None
    group: str
    split: int | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        """Name of the run for display."""
        variant = f", {self.variant}" if self.variant else ""
        split = "" if self.split is None else f", split {self.split}"
        return f"{self.method}{variant}{split}, seed {self.seed}"

    @property
    def config(self) -> Path:
        """Return the file with the settings of this run."""
        return self.folder / "config.yaml"

    @property
    def log(self) -> Path:
        """Return the file with the output of this run."""
        return self.folder / "log.txt"

    @property
    def digest(self) -> str:
        """Hash of everything that determines the results, except by rounding: settings, seed and version."""
        identity = {**self._decisive, "seed_everything": self.seed, "version": __version__}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def data(self) -> str:
        """Describe the settings of the data, which two runs on the same data share."""
        return json.dumps(self._decisive["data"], sort_keys=True)

    @property
    def _decisive(self) -> Settings:
        """Return the settings without those that change the results only by rounding, or nothing but the display."""
        settings = copy.deepcopy(self.settings)
        data, loop = (part.get("init_args", {}) for part in (settings["data"], settings["model"].get("loop", {})))
        for part, without in ((settings["trainer"], NOT_TRAINING), (data, NO_EFFECT), (loop, NO_EFFECT)):
            for key in without:
                part.pop(key, None)
        return settings

    def state(self) -> State:
        """Return how far the run is, from the files in its folder.

        Raises:
            ConfigurationError: the folder holds files that are not from a run.
        """
        done, started = _read(self.folder / "results.json"), _read(self.folder / STARTED)
        if (done.get("digest"), done.get("checkpoint")) == (self.digest, self.checkpoint):
            return "done"
        if started.get("digest") == self.digest:
            return "interrupted"
        if started:
            return "changed"
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigurationError(
                f"{self.folder} holds files that `flow-pl compare` did not write: choose another folder with --out."
            )
        return "new"

    def prepare(self) -> None:
        """Prepare the folder; a run with other settings is moved to a folder beside it."""
        if self.state() == "changed":
            numbered = (self.folder.with_name(f"{self.folder.name}.earlier{i}") for i in itertools.count(1))
            self.folder.rename(next(folder for folder in numbered if not folder.exists()))
        self.folder.mkdir(parents=True, exist_ok=True)
        # left by the last attempt, or by a test of another checkpoint
        for name in ("results.json", "test.json", "clients.csv", "log.txt"):
            (self.folder / name).unlink(missing_ok=True)
        write_text(self.folder / STARTED, json.dumps({"digest": self.digest}) + "\n")
        name = self.name.replace(", ", "-").replace(" ", "")
        settings = run_settings(self.settings, name, self.seed, self.folder, self.group)
        write_text(self.config, f"{CONFIG_HEADER}\n# {self.name}\n{yaml.safe_dump(settings, sort_keys=False)}")

    def finish(self, seconds: float) -> None:
        """Write the results, as the last step of the run.

        Args:
            seconds: duration of the run, or of its resumed part.

        Raises:
            ConfigurationError: the test has written no results, or nothing was validated.
        """
        tested = _read(self.folder / "test.json")
        if self.checkpoint is None:
            if not read_curve(self.folder / "curve.csv"):
                raise ConfigurationError(f"the run ended without validation results; see {self.log}.")
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            tested = {"data": _read(self.folder / DATA)}
        elif not tested or not (self.folder / "clients.csv").exists():
            raise ConfigurationError(f"the run ended without test results; see {self.log}.")
        identity = {"method": self.method, "seed": self.seed, "digest": self.digest, "checkpoint": self.checkpoint}
        run = {**identity, "version": __version__, "seconds": round(seconds, 1)}
        run |= {name: tested[name] for name in ("round", "results", "accuracy", "data") if name in tested}
        tables = (self.folder / name for name in ("clients.csv", "curve.csv"))
        run["checksums"] = {table.name: zlib.crc32(table.read_bytes()) for table in tables if table.exists()}
        write_text(self.folder / "results.json", json.dumps(run, indent=2) + "\n")

    def results(self) -> dict[str, Any]:
        """Return what `finish` wrote."""
        return _read(self.folder / "results.json")

    def check_tables(self) -> None:
        """Check that the tables are unchanged since `finish`.

        Raises:
            ConfigurationError: a table was truncated, changed or removed.
        """
        remedies = {"clients.csv": self.folder / "results.json", "curve.csv": self.folder}
        for name, checksum in self.results().get("checksums", {}).items():
            path = self.folder / name
            if not path.exists() or zlib.crc32(path.read_bytes()) != checksum:
                raise ConfigurationError(
                    f"{path} was damaged or changed since {self.name} wrote it: delete {remedies[name]} "
                    "and run the same command to create it again."
                )

    def failure(self, exitcode: int) -> str:
        """Return why the run failed: the message of the last error in its log.

        Args:
            exitcode: exit code of the process; negative if a signal ended it.
        """
        if exitcode < 0:
            killed = " (out of memory?)" if exitcode == -9 else ""
            return f"ended by signal {-exitcode}{killed}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        said = [line for line in lines if line.strip()]
        errors = [line for line in said if line.startswith("error: ")]
        return (errors or said or [f"ended with exit status {exitcode}"])[-1].removeprefix("error: ")


def check_same_data(runs: Iterable[Run]) -> None:
    """Check that finished runs with the same settings of the data have the same rows.

    Args:
        runs: the runs that are done.

    Raises:
        ConfigurationError: the rows or their split have changed between two runs, as in a file that was written again.
    """
    made: dict[str, list[tuple[Run, object]]] = {}
    for run in runs:
        made.setdefault(run.data, []).append((run, run.results().get("data")))
    for each in made.values():
        known = [(run, record) for run, record in each if record is not None]
        others = [run.name for run, record in known if record != known[-1][1]]
        if others:
            alike = [run.name for run, record in known if record == known[-1][1]]
            raise ConfigurationError(
                f"the data changed between the runs, though their settings are the same: {'; '.join(others)} had other "
                f"rows or another split than {'; '.join(alike)}. Delete the folders of those made before the change, "
                "and run the same command again."
            )


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file; return an empty mapping if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_run(run: Run) -> RunResults:
    """Return the results of a run that is done.

    Raises:
        ConfigurationError: a table was damaged.
    """
    run.check_tables()
    written = run.results()
    clients = [
        Client(
            name=row["client"],
            population=row["population"],
            examples=int(row["train_examples"]),
            generalized=float(row["generalized_accuracy"]),
            personalized=float(row["personalized_accuracy"]),
            evaluated=int(row["evaluated"]),
        )
        for row in read_table(run.folder / "clients.csv")
    ]
    curve = read_curve(run.folder / "curve.csv")
    made = max(curve, default=0)
    return RunResults(
        method=run.method,
        seed=run.seed,
        folder=run.folder,
        rounds=written["round"],
        train_seconds=curve[made]["train_seconds"] if curve else None,
        train_rounds=made,
        populations=written["results"],
        clients=clients,
        curve=curve,
        split=run.split,
        accuracy=written.get("accuracy", ""),
    )
