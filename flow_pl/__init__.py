"""Personalized federated learning with PyTorch Lightning: one training epoch is one communication round."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flow_pl.version import __version__

if TYPE_CHECKING:
    from flow_pl.engine.loop import FederatedLoop
    from flow_pl.module import FederatedModule
    from flow_pl.serving import load, personalize

__all__ = ["FederatedLoop", "FederatedModule", "__version__", "load", "personalize"]

_HOMES = {
    "FederatedLoop": "flow_pl.engine.loop",
    "FederatedModule": "flow_pl.module",
    "load": "flow_pl.serving",
    "personalize": "flow_pl.serving",
}
"""Lazily imported names: torch and Lightning take seconds, too long for help or a mistyped option."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
