"""The command line: `flow-pl fit | validate | test | predict` (LightningCLI), and `flow-pl compare`."""

from __future__ import annotations

import json
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

import flow_pl.methods
import flow_pl.models  # noqa: F401 (imported, their classes go by their bare names in YAML)
from flow_pl import callbacks
from flow_pl.callbacks.metrics_log import MetricsLog, continue_log
from flow_pl.callbacks.preemption import Preemption
from flow_pl.checks import check_class_paths
from flow_pl.data import FederatedDataModule
from flow_pl.errors import ConfigurationError, FlowError, find_cause
from flow_pl.loggers import RunLogger, continued_run, make_wandb_logger, sweep_folder
from flow_pl.module import FederatedModule
from flow_pl.utils.checkpoints import WholeCheckpointIO, look_at
from flow_pl.version import __version__

DEFAULT_CALLBACKS = (
    callbacks.GeneralizedAccuracy,
    callbacks.PersonalizedAccuracy,
    callbacks.PersonalizationGain,
    callbacks.RoutingStatistics,
    callbacks.RoundProgressBar,
    callbacks.ResultsTable,
    callbacks.PredictionWriter,
    callbacks.WandbRun,
    callbacks.WandbResults,
    MetricsLog,
    Preemption,
)
"""Always there; one that is listed in a configuration replaces its default."""

DESCRIPTION = """Personalized federated learning, one command for each stage of a run.
Another command, `flow-pl compare`, trains and tests several configurations: see `flow-pl compare --help`."""


RESUME = "what was saved is intact, and the same command with --ckpt_path last goes on from it"

LOST = {
    "DataLoader worker (pid": "a worker that loads data was ended from outside, most often because memory ran out; "
    "lower data.num_workers or data.chunk_size",
    "Connection closed by peer": "another process of the run has ended; what it said tells why",
    "Connection reset by peer": "another process of the run has ended; what it said tells why",
}
"""What it means when an error's message has these words."""


class ConfigToLogger(SaveConfigCallback):
    """Saves the configuration beside the logs and hands it to the loggers as hyper-parameters."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the configuration to every logger."""
        settings = json.loads(self.parser.dump(self.config, skip_none=False, format="json"))
        # not what one command alone was given (a checkpoint, say)
        kept = {key: value for key, value in settings.items() if key in ("seed_everything", "trainer", "data", "model")}
        for logger in trainer.loggers:
            logger.log_hyperparams(kept)


class FlowCLI(LightningCLI):
    """LightningCLI whose defaults suit federated training."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and look at the checkpoint file before anything else does.

        Raises:
            ConfigurationError: it is missing, damaged, or none of this project; or a class path names no class.
        """
        super().parse_arguments(parser, args)
        check_class_paths(self.config)
        path = self.config[self.config["subcommand"]].get("ckpt_path")
        if path == "best" and self.config["subcommand"] != "fit":
            raise ConfigurationError(
                "--ckpt_path best is known to a run of fit alone: give the file, "
                "such as checkpoints/best.ckpt in the run's folder."
            )
        if path in (None, "best", "last", "hpc", "registry") or str(path).startswith("registry:"):
            return
        look_at(path)

    def before_instantiate_classes(self) -> None:
        """Give a run of a W&B sweep a folder of its own, and a checkpoint's command the W&B run of the checkpoint."""
        settings = self.config[self.config["subcommand"]]
        trainer = settings["trainer"]
        trainer["default_root_dir"] = sweep_folder(str(trainer["default_root_dir"]))
        run_id = continued_run(Path(trainer["default_root_dir"]), settings.get("ckpt_path"))
        self.parser.add_instantiator(partial(make_wandb_logger, run_id), WandbLogger)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has, where the configuration does not list its own.

        Metrics, progress bar and tables; CSV logs, and checkpoints of the best and the last round, in the run's
        folder (`trainer.default_root_dir`).
        """
        root = Path(self._get(self.config_init, "trainer.default_root_dir"))
        listed = self._get(self.config_init, "trainer.callbacks") or []
        listed = listed if isinstance(listed, Sequence) else [listed]
        wanted = [make for make in DEFAULT_CALLBACKS if not any(isinstance(callback, make) for callback in listed)]
        if self._get(self.config_init, "trainer.enable_progress_bar") is False:
            wanted = [make for make in wanted if not issubclass(make, ProgressBar)]
        defaults: list[Callback] = [make() for make in wanted]
        checkpointing = self._get(self.config_init, "trainer.enable_checkpointing") is not False
        if checkpointing and not any(isinstance(callback, Checkpoint) for callback in listed):
            defaults += _checkpoints(root)
        self.trainer_defaults["callbacks"] = defaults
        if self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = RunLogger(root, name="logs")
        plugins = self._get(self.config_init, "trainer.plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit":
            continue_log(trainer, self._get(self.config_init, "ckpt_path"))
        return trainer

    def before_predict(self) -> None:
        """Predictions go to a file as they come: kept, they would grow with the population."""
        predict = self.config_init[str(self.subcommand)]
        predict["return_predictions"] = bool(predict["return_predictions"])


def _checkpoints(root: Path) -> list[Callback]:
    """best.ckpt: the round with the best personalized accuracy; last.ckpt: the last one, written every round."""
    best = ModelCheckpoint(
        root / "checkpoints",
        filename="best",
        monitor="val/personalized_accuracy",
        mode="max",
        enable_version_counter=False,
    )
    last = ModelCheckpoint(
        root / "checkpoints", filename="last", save_on_train_epoch_end=True, enable_version_counter=False
    )
    return [best, last]


def run(args: ArgsType = None) -> FlowCLI:
    """Run the command line and hand back what it made.

    Args:
        args: as in `sys.argv[1:]`; None to take those.

    Returns:
        The finished CLI, with its trainer, model and data module.
    """
    return FlowCLI(
        FederatedModule,
        FederatedDataModule,
        subclass_mode_data=True,
        save_config_callback=ConfigToLogger,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"prog": "flow-pl", "version": __version__, "description": DESCRIPTION},
        trainer_defaults={
            # personalization takes gradients in validation and test
            "inference_mode": False,
            # the sampler shares the cohort over processes itself
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 1,
            # one line, "server"
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": "runs",
        },
        args=args,
    )


def _silence_advertisements() -> None:
    """Keep what is no user's business off the screen: tips for other products, notes for Lightning's own developers."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    for module in ("trainer.connectors.logger_connector.logger_connector", "utilities.rank_zero"):
        logging.getLogger(f"lightning.pytorch.{module}").addFilter(lambda record: "Tip:" not in record.getMessage())


def main(args: ArgsType = None) -> None:
    """Run the command line; what a user can mend ends with one message and exit status 1.

    Args:
        args: as in `sys.argv[1:]`; None to take those.
    """
    _silence_advertisements()
    words = sys.argv[1:] if args is None else args
    try:
        if isinstance(words, list) and words[:1] == ["compare"]:
            from flow_pl.compare.command import compare  # which imports this module

            status = compare(words[1:])
            if status:
                raise SystemExit(status)
        else:
            run(args)
    except SIGTERMException:
        print(f"stopped by SIGTERM: {RESUME}.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    except Exception as error:
        lost = next((text for text, meaning in LOST.items() if text in str(error)), None)
        if lost is not None:
            print(f"error: {LOST[lost]} ({str(error).splitlines()[0]}): {RESUME}.", file=sys.stderr)
            raise SystemExit(1) from error
        cause = find_cause(error, FlowError, MisconfigurationException)
        if cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        raise SystemExit(1) from None
