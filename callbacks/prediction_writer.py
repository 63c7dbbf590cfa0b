"""Writes predictions to disk, one row for each predicted target."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from rich import get_console

from flow_pl.callbacks._federated import federated_data, federated_module
from flow_pl.callbacks._output_files import check_ending, check_writable, in_run_folder
from flow_pl.callbacks._prediction_files import FORMATS, Column, PredictionFile
from flow_pl.data import FederatedDataModule
from flow_pl.errors import DataError
from flow_pl.evaluation.counts import ClientPredictions
from flow_pl.tasks import Objective


class PredictionWriter(Callback):  # not a BasePredictionWriter, which needs example indices from the dataloader
    """Writes the results of `predict`: one row per instance of each client, or per token if tokens are predicted.

    Columns: `client` (name), `population` (`seen` or `new`), `instance` (index within the client's held-out
    examples), for tokens `position` (in the sequence, from 0; padding has no row), `prediction`, `label`,
    `generalized_correct`, `personalized_correct` (these three are empty if there is no label), and
    `route_<block>` (`local` or `global`) for each routed block. If the classes have names, as text labels
    do, `predicted_class` and `true_class` contain them.

    In regression, `prediction` and `label` are real values, and the other two the share of the label's variance that
    each model explains (`Regression.correct`).
    In multi-label tasks, `prediction` lists the predicted labels, the most probable first, `label` the true
    ones, and the other two count the true labels that the models find.

    Rows are written batch by batch, so memory does not grow with the population, provided that the trainer does
    not keep the predictions as well (`return_predictions=False`). Each process writes a part beside the file; the
    first one joins them, in the order of the processes, and puts the file in place when it is complete.

    Args:
        path: the file, .csv or .parquet (which needs pyarrow), in the run's folder
            (`trainer.default_root_dir`); folders are created.

    Raises:
        ConfigurationError: `path` has another ending; before predicting, it cannot be written or pyarrow is missing.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        self.path = self._file = check_ending(path, tuple(FORMATS))
        self._part: PredictionFile | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open this process's part, so that a run whose file is not writable does not start."""
        if stage != "predict":
            return
        self._file = in_run_folder(trainer, self.path)
        check_writable(self._file)
        module = federated_module(pl_module)
        types = column_types(module.objective, module.route_names, federated_data(trainer).class_names)
        self._part = FORMATS[self.path.suffix](self._part_path(trainer.global_rank), types)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a chunk of clients."""
        assert self._part is not None
        module = federated_module(pl_module)
        if outputs.mask.any():
            self._part.write(prediction_rows(outputs, federated_data(trainer), module.objective, module.route_names))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the complete file into place."""
        assert self._part is not None
        self._part.close()
        self._part = None  # close first: a part is kept even if the parts cannot be joined
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            self._join(trainer.world_size)
            get_console().print(f"predictions: {self._file}", soft_wrap=True, highlight=False, markup=False)
        trainer.strategy.barrier("predictions joined")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove an incomplete part."""
        self._discard()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove an incomplete part."""
        self._discard()

    def _part_path(self, rank: int) -> Path:
        return self._file.with_name(f"{self._file.name}.part{rank}")

    def _join(self, processes: int) -> None:
        parts = [self._part_path(rank) for rank in range(processes)]
        missing = [part.name for part in parts if not part.exists()]
        if missing:
            raise DataError(
                f"{', '.join(missing)} not found in {self._file.parent}, expected a part from each of {processes} "
                "processes: set path to a folder that all machines share."
            )
        complete = parts[0]
        if processes > 1:
            complete = self._file.with_name(f"{self._file.name}.joined")
            FORMATS[self._file.suffix].join(parts, complete)
            for part in parts:
                part.unlink()
        os.replace(complete, self._file)

    def _discard(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part.path.unlink(missing_ok=True)
            self._part = None


def column_types(objective: Objective, blocks: list[str], class_names: Sequence[str] = ()) -> dict[str, type]:
    """Return the columns of a prediction file.

    Args:
        objective: the task.
        blocks: names of the routed blocks.
        class_names: names of the classes, if they have any.

    Returns:
        The type of each column, by name, in the order of the file.
    """
    label: type
    correct: type
    if objective.real_valued:
        label, correct = float, float
    else:
        label, correct = (list, int) if objective.several_labels else (int, bool)
    types: dict[str, type] = {"client": str, "population": str, "instance": int}
    types |= dict.fromkeys(objective.positions, int)
    types |= {"prediction": label, "label": label, "generalized_correct": correct, "personalized_correct": correct}
    types |= dict.fromkeys(("predicted_class", "true_class") if _are_named(objective, class_names) else (), str)
    return types | {f"route_{block}": str for block in blocks}


def prediction_rows(
    predictions: ClientPredictions, data: FederatedDataModule, objective: Objective, blocks: list[str]
) -> dict[str, Column]:
    """Return the rows of a chunk of clients, without padding.

    Args:
        predictions: output of `predict_step`, with at least one prediction.
        data: data module with the clients' names and populations.
        objective: the task.
        blocks: names of the routed blocks.

    Returns:
        The values of each column of `column_types`, masked where a row has none.
    """
    mask = predictions.mask.cpu().numpy()
    row, instance, *positions = mask.nonzero()
    clients = predictions.client.tolist()
    names = np.array([data.client_name(client) for client in clients], dtype=str)
    populations = np.array([data.population(client) for client in clients], dtype=str)
    prediction, label, generalized, personalized = (
        column.cpu().numpy()[mask]
        for column in (
            predictions.prediction,
            predictions.label,
            predictions.generalized_correct,
            predictions.personalized_correct,
        )
    )
    unlabelled = np.isnan(label) if objective.real_valued else label < 0
    if objective.several_labels:
        unlabelled = unlabelled.all(axis=1)
        prediction, label = _lists(prediction), _lists([np.flatnonzero(labels > 0) for labels in label])
        generalized, personalized = generalized.sum(axis=1), personalized.sum(axis=1)
    columns = {"client": names[row], "population": populations[row], "instance": instance}
    columns |= dict(zip(objective.positions, positions, strict=True))
    columns["prediction"] = prediction
    labelled = {"label": label, "generalized_correct": generalized, "personalized_correct": personalized}
    rows: dict[str, Column] = {name: np.ma.array(values) for name, values in columns.items()}
    rows |= {name: np.ma.array(values, mask=unlabelled) for name, values in labelled.items()}
    if _are_named(objective, data.class_names):
        # an output beyond the classes of the data has no name
        classes = np.array([*data.class_names, ""], dtype=str)
        named = {"predicted_class": prediction, "true_class": label}
        places = {name: np.where((n < 0) | (n >= len(classes) - 1), len(classes) - 1, n) for name, n in named.items()}
        rows |= {name: np.ma.array(classes[place], mask=classes[place] == "") for name, place in places.items()}
    if predictions.routes is not None:
        local = predictions.routes.cpu().numpy()[mask]
        routes = np.where(local, "local", "global")
        rows |= {f"route_{block}": np.ma.array(routes[:, i]) for i, block in enumerate(blocks)}
    return rows


def _are_named(objective: Objective, class_names: Sequence[str]) -> bool:
    """Return whether the targets have names: one class for each example or position."""
    return bool(class_names) and not objective.several_labels


def _lists(values: Sequence[NDArray[Any]] | NDArray[Any]) -> NDArray[Any]:
    """Convert arrays of any lengths to one array of lists [n]."""
    return np.fromiter((entries.tolist() for entries in values), dtype=object, count=len(values))
