"""Types shared by all packages: named parameters, groups of them, and optimizer factories."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer

Parameters = dict[str, Tensor]
"""Parameters of one copy of a module by name."""


Groups = dict[str, Parameters]
"""Parameter groups by name: "global" (w_g), "local" (w_l), "router" (psi), ...."""


OptimizerFactory = Callable[[Sequence[Tensor]], Optimizer]
"""Makes an optimizer for parameters; in YAML a `class_path` with `init_args`."""


def client_rows(p: Tensor) -> Tensor:
    """Flatten a parameter of several clients [C, ...] to a row for each [C, numbers]; a scalar is one number."""
    return p.flatten(1) if p.ndim > 1 else p.unsqueeze(1)
