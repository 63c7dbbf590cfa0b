"""Search the settings of several methods with the same effort, on validation examples.

Each setting is tried with a few values: the first with the others as configured, the next with the best value of the
first. Nothing is tested.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from flow_pl.compare.runs import Run
from flow_pl.compare.settings import Settings
from flow_pl.errors import ConfigurationError
from flow_pl.results.runs import read_curve

SHIPPED = Path(__file__).with_name("search.yaml")
"""Values to try for the shipped methods."""

METRIC = "personalized_accuracy"
"""Column of a run's validation metrics that settings are chosen by."""

Values = Mapping[str, Sequence[Any]]
"""Values to try, by argument of a method, in the order of the search."""


def read_values(file: Path | None) -> dict[str, Values]:
    """Return the values to try, by method.

    Args:
        file: YAML file that adds to the shipped values, or replaces those of a method; None for the shipped ones.

    Raises:
        ConfigurationError: the file cannot be read, or has another form.
    """
    values: dict[str, Values] = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    if file is None:
        return values
    try:
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--search: {file} cannot be read ({error}).") from error
    if not isinstance(own, dict) or not all(_is_search(each) for each in own.values()):
        raise ConfigurationError(
            f"--search: {file} is not a search, expected for each method its arguments with lists of distinct values, "
            "such as `ditto: {regularization: [0.1, 1.0]}`, or `{}` for none."
        )
    return values | own


def _is_search(values: object) -> bool:
    lists = list(values.values()) if isinstance(values, dict) else [None]
    return all(isinstance(each, list) and each and len(set(map(str, each))) == len(each) for each in lists)


@dataclass(frozen=True, eq=False)
class Trial:
    """A value of a setting, with the runs that measure it.

    Attributes:
        setting: argument of the method.
        value: the value.
        runs: one for each split and seed.
    """

    setting: str
    value: Any
    runs: Sequence[Run]

    def accuracy(self) -> float | None:
        """Return the mean accuracy after the last round, 0 to 1; None if a run failed or has no such number."""
        found = [accuracy(run) for run in self.runs]
        return None if any(map(math.isnan, found)) else fmean(found)


def accuracy(run: Run) -> float:
    """Return the personalized accuracy on validation examples after a run's last round; NaN if it is not done.

    Args:
        run: the run.
    """
    if run.state() != "done":
        return math.nan
    run.check_tables()
    curve = read_curve(run.folder / "curve.csv")
    found = curve[max(curve)].get(METRIC)  # None where the file has no number
    return math.nan if found is None else found


class Search:
    """The search for a method's settings.

    Args:
        method: name of the method.
        values: values to try, by argument.
        settings: settings of the method's runs, with every default.

    Attributes:
        best: the best value of each setting that was searched; without those for which no value has an accuracy.
        tried: the trials of each setting that was searched.
    """

    def __init__(self, method: str, values: Values, settings: Settings) -> None:
        self.method = method
        self.values = values
        self.settings = settings
        self.best: dict[str, Any] = {}
        self.tried: list[list[Trial]] = []

    def trials(self, number: int, make_runs: Callable[[str, str, Settings], Sequence[Run]]) -> list[Trial]:
        """Return the trials of the number-th setting; none if there are fewer.

        Args:
            number: of the setting, from 0; the ones before must have been chosen.
            make_runs: makes the runs from the method, the values of its settings as text, and the settings.
        """
        if number >= len(self.values):
            return []
        setting = list(self.values)[number]
        given = self.settings["model"]["method"].get("init_args", {})
        trials = []
        for value in self.values[setting]:
            own = {name: given.get(name) for name in self.values} | self.best | {setting: value}
            text = ", ".join(f"{name}={shown(each)}" for name, each in own.items())
            settings = copy.deepcopy(self.settings)
            settings["model"]["method"].setdefault("init_args", {}).update(self.best | {setting: value})
            trials.append(Trial(setting, value, make_runs(self.method, text, settings)))
        return trials

    def choose(self, trials: Sequence[Trial]) -> None:
        """Take the best of a setting's values; of equal ones the first.

        Args:
            trials: the trials of one setting, executed.
        """
        if not trials:
            return
        self.tried.append(list(trials))
        scored = [(found, trial.value) for trial in trials if (found := trial.accuracy()) is not None]
        if scored:
            self.best[trials[0].setting] = max(scored, key=lambda each: each[0])[1]


def shown(value: Any) -> str:
    """Return a setting's value as text; numbers in their shortest form."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
