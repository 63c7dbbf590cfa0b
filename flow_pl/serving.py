"""Serving: a trained server from its files, and a personalized model for one client from its own examples."""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # public, by its documentation
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn

import flow_pl.methods
import flow_pl.models  # noqa: F401 (imported, their classes go by their bare names in YAML)
from flow_pl.checks import check_checkpoint, check_class_paths
from flow_pl.configuration import KEY
from flow_pl.data import FederatedDataModule
from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.data.dataset import draw_part
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError, DataError, FlowError, find_cause
from flow_pl.methods.base import Method
from flow_pl.module import FederatedModule
from flow_pl.utils.checkpoints import WholeCheckpointIO
from flow_pl.utils.groups import Groups
from flow_pl.utils.rng import Stream, generator


def load(
    config: str | os.PathLike[str] | None, checkpoint: str | os.PathLike[str], *overrides: str
) -> tuple[FederatedModule, FederatedDataModule]:
    """A trained module and its data module, without a trainer.

    Nothing is trained, printed or written, and the generators of random numbers are left as they are. The data need
    not be there: the router's shapes come from the checkpoint. So the data module is not set up; its `transform` can
    be used at once, its clients after `prepare_data()` and `setup()`, which a Trainer calls itself.

    What clients of a stateful method kept is in the checkpoint, but is not loaded: give a Trainer the `ckpt_path` for
    that. For `personalize` every client is one that has not been sampled yet.

    Args:
        config: YAML file of the run, of `configs` or the one that the run has saved; None = what the checkpoint says.
            What it says of the trainer and the seed has no effect.
        checkpoint: of the run, on the CPU when it is loaded.
        *overrides: options of the command line for `--model` and `--data`, such as "--data.cache_dir=/tmp/stores".

    Returns:
        The module in evaluation mode, and the data module.

    Raises:
        ConfigurationError: the configuration is not valid; or the checkpoint is missing, damaged, none of this project
            or of another method or backbone, or holds no configuration where none is given.
    """
    saved = WholeCheckpointIO().load_checkpoint(os.fspath(checkpoint))
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced at once
        module, data = instantiate(_saved_settings(saved, checkpoint) if config is None else config, *overrides)
    check_checkpoint(saved["flow_pl"], module.identity(), saved["state_dict"], dict(module.state_dict()))
    module.load_state_dict(saved["state_dict"])
    return module.eval(), data


def _saved_settings(saved: dict[str, Any], checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    settings: dict[str, Any] = saved.get(KEY, {})
    if not {"model", "data"} <= settings.keys():
        raise ConfigurationError(
            f"the checkpoint {checkpoint} holds no configuration, since its run was put together in Python: give the "
            "configuration's file."
        )
    return {section: settings[section] for section in ("model", "data")}


def instantiate(
    config: str | os.PathLike[str] | dict[str, Any], *overrides: str
) -> tuple[FederatedModule, FederatedDataModule]:
    """The untrained module and the data module of a configuration, as the command line makes them.

    Args:
        config: YAML file of a run, or its sections "model" and "data".
        *overrides: options of the command line for `--model` and `--data`.

    Raises:
        ConfigurationError: they are not valid.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    for ignored in ("seed_everything", "trainer", "ckpt_path", "weights_only"):
        parser.add_argument(f"--{ignored}", type=Any)
    parser.add_lightning_class_args(FederatedModule, "model")
    parser.add_lightning_class_args(FederatedDataModule, "data", subclass_mode=True)
    try:
        # a configuration may stand in the place of its file
        file = yaml.safe_dump(config) if isinstance(config, dict) else os.fspath(config)
        settings = parser.parse_args(["--config", file, *overrides])
        check_class_paths(settings)
        made = parser.instantiate_classes(settings)
    except argparse.ArgumentError as error:
        named = "the configuration" if isinstance(config, dict) else config
        raise ConfigurationError(f"{named} cannot be used: {error}") from error
    except Exception as error:
        cause = find_cause(error, FlowError)
        if cause is None:
            raise
        raise cause from None
    return made.model, made.data


class PersonalModel(nn.Module):
    """What a client predicts with; made by `personalize`.

    Args:
        method: of the run, bound to its backbone.
        groups: the client's parameter groups, personalized.
    """

    def __init__(self, method: Method, groups: Groups) -> None:
        super().__init__()
        self._method = method
        self._groups = groups

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Outputs for instances x [N, ...], as the backbone gives them: [N, classes] or [N, T, tokens].

        With hard routing by the instance, each goes through one copy of a block alone (Flow with `routing: hard`).
        """
        modules = self._method.modules.values()
        modes = [module.training for module in modules]
        for module in modules:
            module.eval()
        try:
            return self._method.personalized(self._groups, x)
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.train(mode)


def personalize(module: FederatedModule, x: Tensor, y: Tensor, seed: int = 0) -> PersonalModel:
    """Personalize the server's model for a client that need not have been seen in training.

    The same steps are taken as when a client is evaluated (`Method.personalization`).

    Args:
        module: trained; of a checkpoint, say.
        x: the client's examples [N, ...], as a model gets them (`FederatedDataModule.transform`).
        y: their targets [N] or [N, ...].
        seed: of the order in which they are visited, and of dropout.

    Returns:
        The client's model; the module is not changed.

    Raises:
        DataError: there is no example, or not one target for each.
    """
    if len(x) != len(y) or not len(x):
        raise DataError(f"x has {len(x)} examples and y {len(y)} targets, expected one for each, and at least one.")
    n, method = len(x), module.method
    random = generator(seed, Stream.EVALUATION_ORDER, 0)
    orders = np.stack([random.permutation(n) for _ in range(method.epochs)])
    device = next(module.parameters()).device
    batch = ClientBatch(
        client=torch.zeros(1, dtype=torch.int64),
        train=Examples(x[None], y[None], torch.ones(1, n, dtype=torch.bool), (n,)),
        part=torch.from_numpy(draw_part(seed, 0, n))[None],
        order=torch.from_numpy(orders)[None],
        heldout=None,
        round=-1,
        seed=seed,
    ).to(device)
    return PersonalModel(method, module.loop.personalize(method, server_groups(method), batch))
