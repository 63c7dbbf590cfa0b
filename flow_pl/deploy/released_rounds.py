"""Record the private rounds whose models nodes may have received, so that a killed run does not forget any."""

from __future__ import annotations

import json
from pathlib import Path

from flow_pl.engine.privacy import Ledger
from flow_pl.errors import ConfigurationError
from flow_pl.results.run_folder import RELEASED
from flow_pl.utils.files import write_text


def record_rounds(folder: Path, ledger: Ledger) -> None:
    """Write a ledger into the folder of a run, before a model of its last round is sent to a node.

    Args:
        folder: folder of the run; created if it does not exist.
        ledger: all rounds so far.

    Raises:
        FlowError: the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RELEASED, json.dumps(ledger.state_dict()))


def recorded_rounds(folder: Path) -> Ledger:
    """Read the ledger in the folder of a run; an empty one if there is none.

    Args:
        folder: folder of the run.

    Raises:
        ConfigurationError: the file is damaged.
    """
    path, ledger = folder / RELEASED, Ledger()
    if path.exists():
        try:
            ledger.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(
                f"{path} is damaged, and it holds the rounds that count against the privacy budget: restore it from a "
                "backup, or start a new run in another folder."
            ) from error
    return ledger
