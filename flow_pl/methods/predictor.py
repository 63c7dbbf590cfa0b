"""Create a method without weights, for predictions."""

from __future__ import annotations

import copy
from typing import TypeVar

from flow_pl.methods.base import Method

M = TypeVar("M", bound=Method)


def predictor(method: M) -> M:
    """Return a copy of a bound method that predicts with the groups it is given, and holds no weights.

    It can be copied and pickled. Buffers of its modules are copies.

    Args:
        method: a bound method.
    """
    other = copy.copy(method)
    for name in method.training_only:
        vars(other).pop(name, None)
    # stand-ins without data, since a block may read a weight's shape; copying all weights would be wasteful.
    # Frozen parameters are in no group and never trained, so one copy serves all.
    stand_ins = {
        id(p): p.detach() if name not in method.trained[group] else p.detach().to("meta")
        for group, whole in method.modules.items()
        for name, p in whole.named_parameters()
    }
    other = copy.deepcopy(other, stand_ins)
    for module in (part for whole in other.modules.values() for part in whole.modules()):
        frozen = {name: p for name, p in module._parameters.items() if p is not None and not p.is_meta}
        for name, stand_in in module._parameters.items():
            if name not in frozen:
                # as a plain attribute, since a meta parameter could not be moved to a device
                vars(module)[name] = stand_in
        module._parameters.clear()
        for name, p in frozen.items():
            module.register_buffer(name, p)
        module.training = False
    return other
