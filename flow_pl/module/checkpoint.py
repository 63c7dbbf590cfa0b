"""Save a module's training state in checkpoints, and load it from them."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING, Any, TypeVar

import torch

from flow_pl.checks import check_checkpoint
from flow_pl.configuration import KEY, make, read_settings
from flow_pl.errors import ConfigurationError
from flow_pl.resume import begin_round_anew, check_class_names, check_data, check_features, check_server, server_record
from flow_pl.utils.checkpoints import WholeCheckpointIO

if TYPE_CHECKING:
    from flow_pl.module.federated import FederatedModule

M = TypeVar("M", bound="FederatedModule")


def from_checkpoint(
    cls: type[M],
    checkpoint_path: str | os.PathLike[str] | IO[bytes],
    map_location: Any,
    hparams_file: str | os.PathLike[str] | None,
    strict: bool | None,
    weights_only: bool | None,
    kwargs: dict[str, Any],
) -> M:
    """Load a trained module; see `FederatedModule.load_from_checkpoint`."""
    if not isinstance(checkpoint_path, str | os.PathLike):
        raise ConfigurationError(f"checkpoint_path is a {type(checkpoint_path).__name__}, expected a path.")
    saved = WholeCheckpointIO().load_checkpoint(os.fspath(checkpoint_path), weights_only=weights_only)
    settings = saved.get(KEY) if hparams_file is None else read_settings(hparams_file)
    if not settings and not {"backbone", "method"} <= kwargs.keys():
        raise ConfigurationError(
            f"the checkpoint {checkpoint_path} holds no configuration, since its run was set up in Python: "
            "give the arguments of that run, as in load_from_checkpoint(path, backbone=..., method=...)."
        )
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, but replaced at once
        module = make(cls, (settings or {}).get("model", {}), kwargs)
    check_checkpoint(saved["flow_pl"], module.identity(), saved["state_dict"], dict(module.state_dict()))
    module.load_state_dict(saved["state_dict"], strict=strict is not False)
    return module if map_location is None else module.to(map_location)


def identity(module: FederatedModule) -> dict[str, str]:
    """Return the settings that a checkpoint must have been trained with; see `FederatedModule.identity`."""
    named = {"method": type(module.method).__name__, "backbone": type(module.backbone).__name__}
    model = module.method.model
    if model.chosen:
        named["blocks"] = ", ".join(model.blocks)
    return named if module.batch_norm is None else {**named, "batch_norm": module.batch_norm}


def save(module: FederatedModule, checkpoint: dict[str, Any]) -> None:
    """Add the training's settings and the clients' state to a checkpoint."""
    checkpoint["flow_pl"] = module.identity()
    checkpoint["server"] = _server_record(module)
    data_now = module.data_record()
    if data_now is not None:
        checkpoint["data"] = data_now
    checkpoint["chunk_size"] = module.chunks.state_dict()
    if module.privacy is not None:
        checkpoint["privacy"] = module.privacy.state_dict()
    if module.states is not None and module.trainer.is_global_zero:
        data = module.trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["client_states"] = module.states.state_dict(data.client_name)


def load(module: FederatedModule, checkpoint: dict[str, Any]) -> None:
    """Resume from a checkpoint; see `FederatedModule.on_load_checkpoint`."""
    if module.trainer.state.fn == "fit" and "optimizer_states" not in checkpoint:
        raise ConfigurationError(
            "the checkpoint holds only weights (save_weights_only), but a fit continues from the state of the "
            "server's optimizer as well: give one that is whole, such as checkpoints/last.ckpt, or test this one."
        )
    data_now = module.data_record() if "data" in checkpoint else None
    if data_now is not None:  # before the sizes, which other classes may change
        check_class_names(checkpoint["data"], data_now)
        check_features(checkpoint["data"], data_now)
    check_checkpoint(
        checkpoint.get("flow_pl", {}), module.identity(), checkpoint["state_dict"], dict(module.state_dict())
    )
    fitting = module.trainer.state.fn == "fit"
    if data_now is not None:
        check_data(checkpoint["data"], data_now, fitting)
    if fitting and "server" in checkpoint:
        module.server_changed = check_server(checkpoint["server"], _server_record(module))
    if fitting:
        begin_round_anew(checkpoint)
    _load_privacy(module, checkpoint.get("privacy"))
    if module.chunks.automatic and checkpoint.get("chunk_size"):
        module.chunks.load_state_dict(checkpoint["chunk_size"])
    if module.states is not None:
        if module.trainer.is_global_zero:
            data = module.trainer.datamodule  # type: ignore[attr-defined]
            index = {data.client_name(client): client for client in range(module.states.population)}
            module.states.load_state_dict(checkpoint["client_states"], index.get)
        module.trainer.strategy.barrier()


def _server_record(module: FederatedModule) -> dict[str, Any]:
    return server_record(module.server_optimizer, module.server_scheduler, module.server.parameters())


def _load_privacy(module: FederatedModule, state: dict[str, Any] | None) -> None:
    """Resume the privacy ledger of a checkpoint.

    Raises:
        ConfigurationError: only the checkpoint's rounds or only the coming ones are private.
    """
    if (state is None) != (module.privacy is None) and module.trainer.state.fn == "fit":
        before, now = ("without", "has") if state is None else ("with", "has no")
        raise ConfigurationError(
            f"the checkpoint was trained {before} model.privacy, this configuration {now} model.privacy: rounds "
            "that are not private would void the guarantee; go on as the checkpoint was trained, or start anew."
        )
    if state is not None and module.privacy is not None:
        module.privacy.load_state_dict(state)
