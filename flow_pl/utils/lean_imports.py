"""Import torch and Lightning without what a short process does not need."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.metadata import DistributionFinder, PackageNotFoundError
from typing import Any

UNUSED = ("matplotlib", "scipy", "transformers")
"""Packages that torchmetrics imports, where they are installed, for plots and for metrics that are not used here."""

FOREIGN = re.compile(r"(?<![\w./~-])(?!(?:flow_pl|torch|lightning|flwr_datasets)\.)[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
"""A dotted name, such as that of a user's class."""


class _Hidden(MetaPathFinder):
    """Answers for some packages as if they were not installed."""

    def __init__(self, packages: Collection[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in self._packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def find_distributions(self, context: DistributionFinder.Context) -> Iterable[Any]:
        if context.name in self._packages:
            raise PackageNotFoundError(context.name)
        return ()


@contextmanager
def lean_imports(without_unused: bool = True) -> Iterator[None]:
    """Save time on the imports in the context: no garbage is collected, and torchmetrics is imported in its lean form.

    Thousands of modules make objects that stay, so looking for garbage among them is in vain. In the lean form,
    torchmetrics takes the packages in `UNUSED` for not installed as long as the process lives. Others can import them
    behind the context. Where torch has been imported before, nothing changes.

    Args:
        without_unused: whether torchmetrics may be imported in its lean form.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        if without_unused:
            _import_torchmetrics()
        yield
    finally:
        gc.freeze()  # later collections pass over what the imports made
        gc.enable()


def _import_torchmetrics() -> None:
    import torch  # noqa: F401 (it may ask for the packages, and should find them)

    hidden = _Hidden(UNUSED)
    sys.meta_path.insert(0, hidden)
    try:
        import torchmetrics  # noqa: F401
    finally:
        sys.meta_path.remove(hidden)


def names_foreign_code(texts: Iterable[str]) -> bool:
    """Return whether configurations may name code of others, which could use all of torchmetrics.

    Args:
        texts: YAML of configurations, and values of options.
    """
    return any(FOREIGN.search(line.partition("#")[0]) for text in texts for line in text.splitlines())
