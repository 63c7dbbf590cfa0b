"""The server's side of the app: Flower's ServerApp around the command `fit`, with the nodes as its clients."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flow_pl.cli import FlowCLI, run
from flow_pl.deploy.nodes import Nodes
from flow_pl.deploy.nodes_data import NodesData
from flow_pl.deploy.remote_module import RemoteModule
from flow_pl.errors import brief
from flow_pl.utils.exit_messages import exit_with_message

RUN_CONFIG: dict[str, str | float | int | bool] = {
    "folder": "",
    "ckpt-path": "",
    "start-timeout": 600.0,
    "round-timeout": 600.0,
    "wait": 60.0,
    "min-nodes": 1,
    "registered-clients": 0,
    "test": True,
}
"""Settings that `flwr run --run-config` may change, with defaults."""


class RunFailedError(Exception):
    """A run has failed, for the reason in the message."""


def make_server_app(config: Path) -> ServerApp:
    """Create a ServerApp for a run.

    Args:
        config: the app's file with the configuration of the run.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            with exit_with_message():
                fit(config, grid, context.run_config)
        except SystemExit as error:
            # Flower sends the log and ends the run on an Exception alone
            raise RunFailedError(brief(error.__context__ or error)) from None

    return app


def fit(config: Path, grid: Grid, run_config: Any) -> FlowCLI:
    """Train a run with the clients of the nodes.

    Args:
        config: the configuration of the run.
        grid: Flower's grid to the nodes.
        run_config: settings by the names in `RUN_CONFIG`.

    Returns:
        The finished CLI.

    Raises:
        FlowError: there are not enough nodes, or the run fails.
    """
    settings = {**RUN_CONFIG, **run_config}
    args = ["fit", f"--config={config}", "--trainer.num_sanity_val_steps=0", "--trainer.devices=1"]
    args += ["--trainer.enable_progress_bar=false"]
    if settings["folder"]:
        args.append(f"--trainer.default_root_dir={os.path.expanduser(str(settings['folder']))}")
    if settings["ckpt-path"]:
        args.append(f"--ckpt_path={settings['ckpt-path']}")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    return run(args, partial(DeployedCLI, grid, settings), RemoteModule)


class DeployedCLI(FlowCLI):
    """The command line of a run whose clients are nodes.

    Args:
        grid: Flower's grid to the nodes.
        settings: see `RUN_CONFIG`.
        *args: see `FlowCLI`.
        **kwargs: see `FlowCLI`.
    """

    def __init__(self, grid: Grid, settings: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._grid = grid
        self._settings = settings
        super().__init__(*args, **kwargs)

    def before_fit(self) -> None:
        """Replace the data by the nodes."""
        nodes = Nodes(
            self._grid,
            self.model.identity(),
            float(self._settings["round-timeout"]),
            float(self._settings["wait"]),
            int(self._settings["min-nodes"]),
        )
        registered = None if self.model.privacy is None else int(self._settings["registered-clients"])
        self.datamodule = NodesData(self.datamodule, nodes, float(self._settings["start-timeout"]), registered)

    def after_fit(self) -> None:
        """Evaluate the clients on their test rows, with their current states."""
        if self._settings["test"] and not self.trainer.interrupted:
            self.trainer.test(self.model, datamodule=self.datamodule)
