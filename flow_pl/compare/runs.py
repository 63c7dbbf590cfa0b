"""One run of a comparison, and what its folder tells of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from flow_pl.compare.settings import Settings, run_settings
from flow_pl.errors import ConfigurationError
from flow_pl.results.run_folder import CONFIG_HEADER
from flow_pl.results.runs import Client, RunResults, read_curve, read_table
from flow_pl.utils.files import write_text
from flow_pl.version import __version__

State = Literal["new", "changed", "interrupted", "done"]
"""Nothing is there; of other settings or another version; not at its end, or tested with another checkpoint; done."""


@dataclass(frozen=True, eq=False)
class Run:
    """A method trained and tested with one seed.

    The folder holds, beside checkpoints and logs: `started.json`, which says of which settings it is; `config.yaml`,
    the settings, from which the run can be repeated; `log.txt`, what it said; and what it measured. `results.json`
    is written last: a run is done when it is there and of the same settings.

    Attributes:
        method: name of the method: the stem of its configuration.
        seed: of everything random but the split.
        folder: of this run alone.
        settings: of the method.
        checkpoint: which one is tested, "last" or "best".
        group: name of the comparison.
        split: seed of the split of the federation, which is in the settings; None where it is the task's.
    """

    method: str
    seed: int
    folder: Path
    settings: Settings
    checkpoint: str
    group: str
    split: int | None = None

    @property
    def name(self) -> str:
        """What it is called on the screen."""
        split = "" if self.split is None else f", split {self.split}"
        return f"{self.method}{split}, seed {self.seed}"

    @property
    def config(self) -> Path:
        """The settings of this run."""
        return self.folder / "config.yaml"

    @property
    def log(self) -> Path:
        """What it said."""
        return self.folder / "log.txt"

    @property
    def digest(self) -> str:
        """Of all that decides its numbers, wherever it is kept: settings, seed and version."""
        trainer = {key: value for key, value in self.settings["trainer"].items() if key != "default_root_dir"}
        identity = {**self.settings, "trainer": trainer, "seed_everything": self.seed, "version": __version__}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def state(self) -> State:
        """What is there of it.

        Raises:
            ConfigurationError: its folder has files, but not of a run.
        """
        done, started = _read(self.folder / "results.json"), _read(self.folder / "started.json")
        if (done.get("digest"), done.get("checkpoint")) == (self.digest, self.checkpoint):
            return "done"
        if started.get("digest") == self.digest:
            return "interrupted"
        if started:
            return "changed"
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigurationError(
                f"{self.folder} has files, but none of `flow-pl compare`: choose another folder with --out."
            )
        return "new"

    def prepare(self) -> None:
        """Make its folder ready; what is there of other settings is removed."""
        if self.state() == "changed":
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # of the last attempt, or of another checkpoint
        for name in ("results.json", "test.json", "clients.csv", "log.txt"):
            (self.folder / name).unlink(missing_ok=True)
        write_text(self.folder / "started.json", json.dumps({"digest": self.digest}) + "\n")
        name = self.name.replace(", ", "-").replace(" ", "")
        settings = run_settings(self.settings, name, self.seed, self.folder, self.group)
        write_text(self.config, f"{CONFIG_HEADER}\n# {self.name}\n{yaml.safe_dump(settings, sort_keys=False)}")

    def finish(self, seconds: float) -> None:
        """Write its results, as the last thing of all.

        Args:
            seconds: that the run, or what was left of it, took.

        Raises:
            ConfigurationError: its test has left none.
        """
        tested = _read(self.folder / "test.json")
        if not tested or not (self.folder / "clients.csv").exists():
            raise ConfigurationError(f"the run ended without results of a test; see {self.log}.")
        identity = {"method": self.method, "seed": self.seed, "digest": self.digest, "checkpoint": self.checkpoint}
        run = {**identity, "version": __version__, "seconds": round(seconds, 1)}
        run |= {"round": tested["round"], "results": tested["results"]}
        tables = (self.folder / name for name in ("clients.csv", "curve.csv"))
        run["checksums"] = {table.name: zlib.crc32(table.read_bytes()) for table in tables if table.exists()}
        write_text(self.folder / "results.json", json.dumps(run, indent=2) + "\n")

    def results(self) -> dict[str, Any]:
        """What `finish` wrote."""
        return _read(self.folder / "results.json")

    def check_tables(self) -> None:
        """Look whether its tables are those that `finish` has seen.

        Raises:
            ConfigurationError: one was truncated, changed or removed since.
        """
        remedies = {"clients.csv": self.folder / "results.json", "curve.csv": self.folder}
        for name, checksum in self.results().get("checksums", {}).items():
            path = self.folder / name
            if not path.exists() or zlib.crc32(path.read_bytes()) != checksum:
                raise ConfigurationError(
                    f"{path} is not what {self.name} has written, it was damaged or changed: delete {remedies[name]}, "
                    "and the same command makes it again."
                )

    def complaint(self, exitcode: int) -> str:
        """Why it failed: the message of the last error in its log.

        Args:
            exitcode: of its process; negative for the signal that ended it.
        """
        if exitcode < 0:
            killed = " (is there enough memory?)" if exitcode == -9 else ""
            return f"ended by signal {-exitcode}{killed}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        said = [line for line in lines if line.strip()]
        errors = [line for line in said if line.startswith("error: ")]
        return (errors or said or [f"ended with exit status {exitcode}"])[-1].removeprefix("error: ")


def _read(path: Path) -> dict[str, Any]:
    """What a file written here says; nothing where it is not there, or was damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_run(run: Run) -> RunResults:
    """What a run that is done measured.

    Raises:
        ConfigurationError: its tables were damaged.
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
    )
