"""Serve: load a trained server model from its files, and personalize it for a client by its own examples."""

from __future__ import annotations

import argparse
import keyword
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # public, by its documentation
from lightning.pytorch.cli import LightningArgumentParser
from numpy.typing import ArrayLike
from torch import Tensor, nn

import flow_pl.methods
import flow_pl.models  # noqa: F401 (imported, their classes go by their bare names in YAML)
from flow_pl.checks import check_checkpoint, check_class_paths, check_fit
from flow_pl.configuration import KEY
from flow_pl.data import FederatedDataModule
from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.data.dataset import draw_part
from flow_pl.data.store.client_checks import check_client
from flow_pl.engine.client_states import client_state
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError, DataError, FlowError, find_cause
from flow_pl.methods.base import Method
from flow_pl.methods.predictor import predictor
from flow_pl.module import FederatedModule
from flow_pl.shipped import find
from flow_pl.utils.checkpoints import WholeCheckpointIO, look_at
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs, leaves, map_inputs, take
from flow_pl.utils.rng import Stream, generator, key

if TYPE_CHECKING:
    from typing_extensions import Self


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
    try:
        settings = parser.parse_args([*(f"--config={file}" for file in files), *overrides])
        check_class_paths(settings)
        made = parser.instantiate_classes(settings)
    except argparse.ArgumentError as error:
        named = "the configuration" if isinstance(config, dict) else ", ".join(map(str, files))
        raise ConfigurationError(f"{named} cannot be used: {error}") from error
    except Exception as error:
        cause = find_cause(error, FlowError)
        if cause is None:
            raise
        raise cause from None
    return made.model, made.data


SINGLE = "model"
"""Name of the group of a model with a single set of the backbone's parameters."""


class ServedModel(nn.Module):
    """Wraps a predictor as a standalone module: its weights are buffers, copied from the source model.

    So it can be moved, converted, copied, pickled and saved like any module, and later training does not change it. It
    always predicts in evaluation mode, even after `train()`, so without dropout.

    Args:
        method: method of the run, bound to its backbone.
        groups: the parameter groups to predict with.
    """

    def __init__(self, method: Method, groups: Groups) -> None:
        super().__init__()
        self.method = predictor(method)
        self.blocks = nn.ModuleList(self.method.modules.values())  # without weights, for their buffers
        self.groups = _Buffers({f"{name}.{key}": p for name, group in groups.items() for key, p in group.items()})
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; its blocks stay in evaluation mode."""
        super().train(mode)
        self.blocks.eval()
        return self

    def weights(self) -> Parameters:
        """Return all tensors by name: those of a single model by the backbone's names, others as group.name."""
        groups = self.tensors()
        if len(groups) == 1:
            ((_, weights),) = groups.items()
            return {**dict(self.method.modules["global"].named_buffers()), **weights}
        found = {f"{name}.{key}": p for name, group in groups.items() for key, p in group.items()}
        for name, block in self.method.modules.items():
            if name in groups:
                found |= {f"{name}.{key}": p for key, p in block.named_buffers()}
        return found

    def tensors(self) -> Groups:
        """Return the parameter groups by name."""
        groups: Groups = {}
        for name, tensor in self.groups.tensors().items():
            group, _, key = name.partition(".")
            groups.setdefault(group, {})[key] = tensor
        return groups


class PersonalModel(ServedModel):
    """Predicts for one client; created by `personalize`.

    Args:
        method: method of the run, bound to its backbone.
        groups: the client's parameter groups, personalized.
    """

    def __init__(self, method: Method, groups: Groups) -> None:
        personal = method.personal(groups)
        needed = {name: group for name, group in groups.items() if name not in method.scratch}
        super().__init__(method, needed if personal is None else {SINGLE: personal})

    def forward(self, x: Inputs) -> Tensor:
        """Compute outputs for instances x [N, ...], as the backbone does: [N, classes] or [N, T, tokens].

        With hard routing, each instance passes through only one copy of a block (Flow with `routing: hard`).
        """
        groups = self.tensors()
        if SINGLE in groups:
            return self.method.model.plain(x, groups[SINGLE])
        return self.method.personalized(groups, x)


class ServerModel(ServedModel):
    """Predicts with the method's generalized model.

    Args:
        module: trained module, for instance from a checkpoint.
    """

    def __init__(self, module: FederatedModule) -> None:
        server = server_groups(module.method)
        super().__init__(module.method, {name: server[name] for name in module.method.models})

    def forward(self, x: Inputs) -> Tensor:
        """Compute outputs for instances x [N, ...], as the backbone does: [N, classes] or [N, T, tokens]."""
        return self.method.generalized(self.tensors(), x)


class _Buffers(nn.Module):
    """Holds tensors by dotted names, as buffers of nested modules.

    A name reserved by Python or torch ("global") gets a trailing underscore, so that it can be an attribute.
    """

    def __init__(self, tensors: Parameters) -> None:
        super().__init__()
        self._names: dict[str, str] = {}
        below: dict[str, Parameters] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                below.setdefault(first, {})[rest] = tensor
            else:
                copied = tensor.detach().clone(memory_format=torch.contiguous_format)
                self.register_buffer(self._attribute(first), copied)
        for first, inner in below.items():
            self.add_module(self._attribute(first), _Buffers(inner))

    def _attribute(self, name: str) -> str:
        attribute = name
        while keyword.iskeyword(attribute) or hasattr(self, attribute):
            attribute += "_"
        self._names[attribute] = name
        return attribute

    def tensors(self) -> Parameters:
        """Return the tensors by their dotted names."""
        found = {self._names[name]: tensor for name, tensor in self.named_buffers(recurse=False)}
        for name, inner in self.named_children():
            assert isinstance(inner, _Buffers)
            found |= {f"{self._names[name]}.{rest}": tensor for rest, tensor in inner.tensors().items()}
        return found


def personalize(
    module: FederatedModule,
    x: Tensor | ArrayLike | Mapping[str, Tensor | ArrayLike],
    y: Tensor | ArrayLike,
    seed: int = 0,
    kept: Groups | None = None,
) -> PersonalModel:
    """Personalize the server's model for a client, which need not have been seen in training.

    The same steps are taken as when a client is evaluated (`Method.personalization`).

    Args:
        module: trained module, for instance from a checkpoint.
        x: the client's examples [N, ...], as passed to a model (`FederatedDataModule.transform`); a mapping for
            several inputs by name.
        y: their targets [N] or [N, ...], integers; -1 for an example without a label, which is ignored. For a
            regression, real values [N], NaN without a label.
        seed: seed of the order of the examples, and of dropout.
        kept: state of a client of a stateful method, without a client axis, from `load_kept`; None for a client that
            has not been sampled.

    Returns:
        The client's model; the module is not changed.

    Raises:
        DataError: there is no example with a label, the number of targets is another, or a value cannot be used.
        ConfigurationError: the examples or `kept` do not fit the model.
    """
    device = next(module.parameters()).device
    method = module.method
    real_valued = method.objective.real_valued
    inputs, y = _labelled(as_inputs("x", x), as_tensor("y", y), real_valued)
    n = len(y)
    classes = 1 if real_valued else y.shape[-1] if method.objective.several_labels else int(y.max()) + 1
    example = map_inputs(lambda t: t[:1].to(device), inputs)
    check_fit(method, example, classes, tuple(y.shape[1:]), real_valued)
    server = server_groups(method)
    if kept is not None:
        _check_kept(method, method.initial_state(server), kept)
        kept = {name: {key: p.to(device)[None].clone() for key, p in group.items()} for name, group in kept.items()}
    random = generator(seed, Stream.EVALUATION_ORDER, 0)
    orders = np.stack([random.permutation(n) for _ in range(module.loop.orders(method))])
    device = next(module.parameters()).device
    batch = ClientBatch(
        client=torch.zeros(1, dtype=torch.int64),
        train=Examples(take(inputs, None), y[None], torch.ones(1, n, dtype=torch.bool), (n,)),
        part=torch.from_numpy(draw_part(seed, 0, n))[None],
        order=torch.from_numpy(orders)[None],
        heldout=None,
        round=-1,
        key=torch.tensor([key(seed, Stream.DROPOUT, 0, 0)]),
    ).to(device)
    return PersonalModel(method, module.loop.personalize(method, server, batch, kept))


def load_kept(module: FederatedModule, checkpoint: str | os.PathLike[str], client: str) -> Groups:
    """Load the state of a client of a stateful method, for `personalize`.

    Args:
        module: module of the same run, from `load`.
        checkpoint: checkpoint of the run.
        client: name of the client in the data.

    Returns:
        Its groups, without a client axis, on the module's device.

    Raises:
        ConfigurationError: the method keeps no state, or the checkpoint is missing, damaged, or of another method.
        DataError: the client has no state, since it has not been sampled.
    """
    method = module.method
    if not method.private:
        raise ConfigurationError(_stateless(method))
    saved = look_at(checkpoint)
    check_checkpoint(saved["flow_pl"], module.identity(), saved["state_dict"], dict(module.state_dict()))
    return client_state(saved["client_states"], client, method.initial_state(server_groups(method)))


def _stateless(method: Method) -> str:
    return (
        f"clients of {type(method).__name__} keep nothing between rounds: leave out the client's state; its "
        "personalized model is made from the server's and its examples."
    )


def _check_kept(method: Method, expected: Groups, kept: Groups) -> None:
    """Check that a client's state has the groups and shapes of its method."""
    if not expected:
        raise ConfigurationError(_stateless(method))
    shapes, found = (
        {f"{name}.{key}": list(p.shape) for name, group in groups.items() for key, p in group.items()}
        for groups in (expected, kept)
    )
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            given = f"{name} of shape {found[name]}" if name in found else f"no {name}"
            some = ", ".join(f"{key} {shape}" for key, shape in list(shapes.items())[:3])
            raise ConfigurationError(
                f"kept has {given}, a client of {type(method).__name__} keeps {some}"
                f"{', ...' if len(shapes) > 3 else ''}: give what load_kept returns."
            )


def as_tensor(name: str, values: Tensor | ArrayLike) -> Tensor:
    """Convert a user's values to a tensor.

    Args:
        name: name of the values, for the message.
        values: a tensor, an array, or lists of numbers.

    Raises:
        DataError: the values are not numbers.
    """
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} has values of type {array.dtype}, expected numbers.")
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def as_inputs(name: str, values: Tensor | ArrayLike | Mapping[str, Tensor | ArrayLike]) -> Inputs:
    """Convert a user's values to a tensor, or a mapping of values to tensors by name; see `as_tensor`."""
    if isinstance(values, Mapping):
        return {key: as_tensor(f"{name}[{key!r}]", each) for key, each in sorted(values.items())}
    return as_tensor(name, values)


def _labelled(x: Inputs, y: Tensor, real_valued: bool) -> tuple[Inputs, Tensor]:
    """Select the examples with a label, in a model's input types: float32 or int64.

    Raises:
        DataError: no example has a label, or a value cannot be used.
    """
    if not y.ndim or not len(y) or not leaves(x) or any(not t.ndim or len(t) != len(y) for t in leaves(x)):
        shape = {k: list(t.shape) for k, t in x.items()} if isinstance(x, dict) else list(x.shape)
        raise DataError(
            f"x has shape {shape} and y {list(y.shape)}: expected one target for each example, and "
            "at least one example."
        )
    if real_valued:
        y = y.float()
    elif y.is_floating_point():
        if not bool((y == y.round()).all()):
            kind = str(y.dtype).removeprefix("torch.")
            raise DataError(f"y has labels of type {kind}: encode them as integers from 0, -1 = to be predicted.")
        y = y.long()  # integers, as NumPy and pandas often store them
    there = ~y.isnan() if real_valued else (y != -1).reshape(len(y), -1).any(1)
    if not there.any():
        none = "NaN" if real_valued else "-1"
        raise DataError(
            f"none of the {len(y)} examples has a label (all of y is {none}), expected at least one: label some of "
            "them, or serve the client with the server's model (ServerModel)."
        )
    arrays = map_inputs(lambda t: t.detach().cpu().numpy(), x)
    check_client("to be personalized", arrays, y.detach().cpu().numpy(), 0, None)

    def selected(t: Tensor) -> Tensor:
        t = t[there]
        return t if t.dtype in (torch.uint8, torch.bool) else t.float() if t.is_floating_point() else t.long()

    return map_inputs(selected, x), y[there] if real_valued else y[there].long()
