"""Run Lightning's commands: `flow-pl fit | validate | test | predict`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only

# so that bare class names work in YAML
import flow_pl.methods
import flow_pl.models
from flow_pl import callbacks, shipped
from flow_pl.callbacks._known_metrics import check_monitors
from flow_pl.callbacks.metrics_log import MetricsLog, continue_log
from flow_pl.callbacks.preemption import Preemption
from flow_pl.callbacks.run_folder import BestCheckpoint, LastCheckpoint, RunFolder
from flow_pl.callbacks.saved_settings import SavedSettings
from flow_pl.callbacks.wandb_run import continued_run
from flow_pl.checks import check_class_paths
from flow_pl.data import FederatedDataModule
from flow_pl.errors import ConfigurationError, FlowError, brief
from flow_pl.loggers import RunLogger, make_wandb_logger, sweep_folder
from flow_pl.module import FederatedModule
from flow_pl.results.run_folder import LOGS, find_checkpoint
from flow_pl.utils.checkpoints import WholeCheckpointIO, look_at
from flow_pl.utils.parser import FlowParser, expand_home
from flow_pl.utils.trainer_settings import check_callbacks, check_seed, check_trainer
from flow_pl.version import __version__

DEFAULT_CALLBACKS = (
    callbacks.GeneralizedAccuracy,
    callbacks.PersonalizedAccuracy,
    callbacks.PersonalizationGain,
    callbacks.RoutingStatistics,
    callbacks.BackdoorSuccess,
    callbacks.RoundProgressBar,
    callbacks.ResultsTable,
    callbacks.PredictionWriter,
    callbacks.WandbRun,
    callbacks.WandbResults,
    MetricsLog,
    Preemption,
    RunFolder,
)
"""Default callbacks, besides `BestCheckpoint` and `LastCheckpoint`; a listed callback may replace one."""

DESCRIPTION = """Personalized federated learning, one command for each stage of a run.
Other commands, each with --help: `flow-pl compare` trains and tests several configurations, `flow-pl export` and
`flow-pl personalize` write a trained model as a file that needs no flow_pl."""


WORDS = (None, "best", "last", "hpc", "registry")
"""Values of --ckpt_path other than a file."""

BARE: dict[str, Any] = {
    "logger": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings that are incompatible with Lightning's `barebones`, which measures the bare speed."""

OURS = ("num_sanity_val_steps", "log_every_n_steps")
"""Those that are on by our own defaults, and are disabled silently."""


class FlowCLI(LightningCLI):
    """Extends LightningCLI by defaults that suit federated training.

    Args:
        *args: see `LightningCLI`.
        **kwargs: see `LightningCLI`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        words = kwargs.get("args")
        words = sys.argv[1:] if words is None else words
        first = words[0] if isinstance(words, list) and words else None
        self._command = first if first in self.subcommands() else None
        super().__init__(*args, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Create the parser of a command; without options if another one is run, to start sooner."""
        if self._command not in (None, subcommand):
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments and check the checkpoint file first.

        Raises:
            ConfigurationError: the file is missing, damaged, or not from this project; or a class path names no class.
        """
        super().parse_arguments(parser, args)
        expand_home(self.config)
        check_class_paths(self.config)
        settings = self.config[self.config["subcommand"]]
        check_seed(settings.get("seed_everything"))
        check_trainer(vars(settings["trainer"]))
        path = self.config[self.config["subcommand"]].get("ckpt_path")
        if path not in WORDS and not str(path).startswith("registry:"):
            look_at(path)

    def before_instantiate_classes(self) -> None:
        """Give each run of a W&B sweep its own folder, and a command with a checkpoint the checkpoint's W&B run."""
        settings = self.config[self.config["subcommand"]]
        trainer = settings["trainer"]
        trainer["default_root_dir"] = sweep_folder(str(trainer["default_root_dir"]))
        self._find_checkpoint(settings)
        run_id = continued_run(Path(trainer["default_root_dir"]), settings.get("ckpt_path"))
        self.parser.add_instantiator(partial(make_wandb_logger, run_id), WandbLogger)

    def _find_checkpoint(self, settings: Any) -> None:
        """Choose and report a checkpoint in the run's folder if a trained model is needed and no file is named.

        Raises:
            ConfigurationError: there is none.
        """
        command, word, trainer = self.config["subcommand"], settings.get("ckpt_path"), settings["trainer"]
        # a fit may start from scratch; a trial measures nothing
        needed = word == "best" if command == "fit" else word in (None, "best", "last", "hpc")
        if not needed or (word is None and trainer.get("fast_dev_run")):
            return
        path = find_checkpoint(Path(trainer["default_root_dir"]), word)
        settings["ckpt_path"] = str(path)
        chosen = "" if word or path.stem == "best" else ", the last one, since no round was validated"
        rank_zero_only(print)(f"{command}: {path} (round {look_at(path)['global_step']}{chosen})")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the default callbacks and loggers that the configuration does not replace.

        These are metrics, progress bar and tables, and in the run's folder (`trainer.default_root_dir`) CSV logs and
        checkpoints of the best and the last round.
        """
        root = Path(self._get(self.config_init, "trainer.default_root_dir"))
        listed = self._get(self.config_init, "trainer.callbacks") or []
        listed = listed if isinstance(listed, Sequence) else [listed]
        defaults: list[Callback] = [make() for make in DEFAULT_CALLBACKS]
        if self._get(self.config_init, "trainer.enable_progress_bar") is False:
            defaults = [default for default in defaults if not isinstance(default, ProgressBar)]
        if self._get(self.config_init, "trainer.enable_checkpointing") is not False:
            defaults += [BestCheckpoint(root), LastCheckpoint(root)]
        check_callbacks(listed)
        barebones = bool(self._get(self.config_init, "trainer.barebones"))
        self.trainer_defaults["callbacks"] = [
            default
            for default in defaults
            if not barebones and not any(_replaces(callback, default) for callback in listed)
        ]
        if barebones:
            # if requested anyway, Lightning rejects it by name
            kwargs |= {name: off for name, off in BARE.items() if not self._asked_for(name)}
            self.save_config_callback = None
        elif self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = RunLogger(root, name=LOGS)
        plugins = self._get(self.config_init, "trainer.plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit":
            check_monitors(trainer, self.model)
            continue_log(trainer, self._get(self.config_init, "ckpt_path"))
        return trainer

    def _asked_for(self, name: str) -> bool:
        """Return whether the user, rather than our defaults, switched on a setting of the trainer."""
        return name not in OURS and bool(self._get(self.config_init, f"trainer.{name}"))

    def instantiate_classes(self) -> None:
        """Instantiate all classes.

        Raises:
            ConfigurationError: a package that a class needs is not installed, or the trainer cannot be created.
        """
        try:
            super().instantiate_classes()
        except ImportError as error:
            raise ConfigurationError(f"a setting needs a package that is not installed: {brief(error)}") from error
        except ValueError as error:
            missing = re.search(r"Requirement '.+' not met.*|No module named .*", str(error))
            if missing is None:
                raise
            raise ConfigurationError(f"a setting needs a package that is not installed: {missing[0]}") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Create the trainer as Lightning does, but report errors in one line."""
        try:
            trainer: Trainer = super()._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            if isinstance(error, FlowError):
                raise
            raise ConfigurationError(f"the trainer rejects these settings: {brief(error)}") from error
        return trainer

    def before_predict(self) -> None:
        """Write predictions to a file as they arrive, since in memory they would grow with the population."""
        predict = self.config_init[str(self.subcommand)]
        predict["return_predictions"] = bool(predict["return_predictions"])


def _replaces(callback: Callback, default: Callback) -> bool:
    """Return whether a listed callback replaces a default one: one of its class, or another progress bar.

    A checkpoint callback does so only if it writes the same file: the same name, and no other folder.
    """
    if isinstance(default, BestCheckpoint | LastCheckpoint):
        if not isinstance(callback, ModelCheckpoint) or callback.filename != default.filename:
            return False
        if callback.dirpath is None:
            callback.dirpath = default.dirpath
        return os.path.realpath(str(callback.dirpath)) == os.path.realpath(str(default.dirpath))
    return isinstance(callback, ProgressBar if isinstance(default, ProgressBar) else type(default))


def run(
    args: ArgsType = None,
    make: Callable[..., FlowCLI] = FlowCLI,
    module: type[FederatedModule] = FederatedModule,
) -> FlowCLI:
    """Run the command line and return the finished CLI.

    Args:
        args: arguments as in `sys.argv[1:]`; None to use those.
        make: creates the CLI, which runs the command.
        module: class of the model.

    Returns:
        The finished CLI, with its trainer, model and data module.
    """
    files: list[str] = []
    if args is None:
        sys.argv[1:], files = shipped.expand(sys.argv[1:])  # Lightning reads sys.argv, also to start other processes
    elif isinstance(args, list):
        args, files = shipped.expand(args)
    return make(
        module,
        FederatedDataModule,
        subclass_mode_data=True,
        save_config_callback=SavedSettings,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=partial(
            FlowParser,
            roots={"trainer": Trainer, "model": module, "data": FederatedDataModule},
            choices={"backbone": [backbone.__name__ for backbone in flow_pl.models.BACKBONES]},
        ),
        parser_kwargs={"prog": "flow-pl", "version": __version__, "description": DESCRIPTION},
        trainer_defaults={
            # personalization needs gradients in validation and test
            "inference_mode": False,
            # our sampler distributes the cohort over processes
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 1,
            # it would have one line, "server"
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": str(Path("runs", shipped.run_name(files))),
        },
        args=args,
    )
