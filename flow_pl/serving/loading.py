"""Load a trained module and its data module from the files of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # public, by its documentation
from lightning.pytorch.cli import LightningArgumentParser

import flow_pl.methods
import flow_pl.models  # noqa: F401 (imported, their classes go by their bare names in YAML)
from flow_pl.checks import check_checkpoint, check_class_paths
from flow_pl.configuration import KEY, clear_errors
from flow_pl.data import FederatedDataModule
from flow_pl.errors import ConfigurationError
from flow_pl.module import FederatedModule
from flow_pl.shipped import find
from flow_pl.utils.checkpoints import WholeCheckpointIO


def load(
    config: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
    checkpoint: str | os.PathLike[str],
    *overrides: str,
) -> tuple[FederatedModule, FederatedDataModule]:
    """Load a trained module and its data module, without a trainer.

    Nothing is trained, printed or written, and random number generators are left untouched. The data need not exist:
    the router's shapes come from the checkpoint. So the data module is not set up; its `transform` can be used at once,
    its clients only after `prepare_data()` and `setup()`, which a Trainer calls itself.

    The clients' state of a stateful method is in the checkpoint but is not loaded: `load_kept` loads it for one client,
    and a Trainer with this `ckpt_path` for all clients.

    Args:
        config: YAML file saved by the run, or the files or names of shipped ones that it was composed of
            (`["task/digits", "method/flow"]`); None = the configuration in the checkpoint. Settings of the trainer and
            the seed have no effect.
        checkpoint: checkpoint of the run; loaded to the CPU.
        *overrides: command-line options for `--model` and `--data`, such as "--data.cache_dir=/tmp/stores".

    Returns:
        The module in evaluation mode, and the data module.

    Raises:
        ConfigurationError: the configuration is not valid; or the checkpoint is missing, damaged, not from this project
            or of another method or backbone, or holds no configuration and none is given.
    """
    saved = WholeCheckpointIO().load_checkpoint(os.fspath(checkpoint))
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, but replaced at once
        module, data = instantiate(_saved_settings(saved, checkpoint) if config is None else config, *overrides)
    check_checkpoint(saved["flow_pl"], module.identity(), saved["state_dict"], dict(module.state_dict()))
    module.load_state_dict(saved["state_dict"])
    return module.eval(), data


def _saved_settings(saved: dict[str, Any], checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    settings: dict[str, Any] = saved.get(KEY, {})
    if not {"model", "data"} <= settings.keys():
        raise ConfigurationError(
            f"the checkpoint {checkpoint} holds no configuration, since its run was set up in Python: give the "
            "configuration's file."
        )
    return {section: settings[section] for section in ("model", "data")}


def instantiate(
    config: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | dict[str, Any], *overrides: str
) -> tuple[FederatedModule, FederatedDataModule]:
    """Create the untrained module and the data module of a configuration, as the command line does.

    Args:
        config: YAML file of a run, or several, or names of shipped ones; or the sections "model" and "data" of a
            configuration.
        *overrides: command-line options for `--model` and `--data`.

    Raises:
        ConfigurationError: the configuration is not valid.
    """
    if isinstance(config, dict):
        files = [yaml.safe_dump(config)]  # a mapping may replace a file
    else:
        listed = [config] if isinstance(config, str | os.PathLike) else config
        files = [str(find(os.fspath(each))) for each in listed]
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    for ignored in ("seed_everything", "trainer", "ckpt_path", "weights_only"):
        parser.add_argument(f"--{ignored}", type=Any)
    parser.add_lightning_class_args(FederatedModule, "model")
    parser.add_lightning_class_args(FederatedDataModule, "data", subclass_mode=True)
    with clear_errors("the configuration" if isinstance(config, dict) else ", ".join(map(str, files))):
        settings = parser.parse_args([*(f"--config={file}" for file in files), *overrides])
        check_class_paths(settings)
        made = parser.instantiate_classes(settings)
    return made.model, made.data
