"""How a command ends that cannot go on: one message and an exit status, in place of a traceback."""

from __future__ import annotations

import logging
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from flow_pl.errors import FlowError, brief, find_cause

RESUME = "what was saved is intact, and the same command with --ckpt_path last goes on from it"

LOST = {
    "DataLoader worker (pid": "a worker that loads data was ended from outside, most often because memory ran out; "
    "lower data.num_workers or data.chunk_size",
    "Connection closed by peer": "another process of the run has ended; what it said tells why",
    "Connection reset by peer": "another process of the run has ended; what it said tells why",
}
"""What it means when an error's message has these words; torch has no type of its own for these."""

FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+), in .+\n(?P<code>.*)')


@contextmanager
def told() -> Iterator[None]:
    """A context in which what a user can mend ends the process with one message and exit status 1.

    SIGTERM ends it with status 143.
    """
    _silence_advertisements()
    try:
        with _short_anomalies():
            yield
    except SIGTERMException:
        print(f"stopped by SIGTERM: {RESUME}.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    except Exception as error:
        lost = next((text for text, meaning in LOST.items() if text in str(error)), None)
        if lost is not None:
            print(f"error: {LOST[lost]} ({str(error).splitlines()[0]}): {RESUME}.", file=sys.stderr)
            raise SystemExit(1) from error
        cause = find_cause(error, FlowError, MisconfigurationException)
        if cause is None and not _told_by_lightning(error) and not _anomaly(error):
            raise
        print(f"error: {_anomaly(error) or (brief(error) if cause is None else cause)}", file=sys.stderr)
        raise SystemExit(1) from None


def _silence_advertisements() -> None:
    """Keep what is no user's business off the screen: tips for other products, notes for Lightning's own developers."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    # shown when an earlier run is about to be moved aside or continued
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    for module in ("trainer.connectors.logger_connector.logger_connector", "utilities.rank_zero"):
        logging.getLogger(f"lightning.pytorch.{module}").addFilter(lambda record: "Tip:" not in record.getMessage())


@contextmanager
def _short_anomalies() -> Iterator[None]:
    """A context in which the trace that `detect_anomaly` shows is cut down to the line that is the user's."""
    shown = warnings.showwarning

    def show(message: Warning | str, *rest: Any, **kwargs: Any) -> None:
        text = str(message)
        if text.startswith("Error detected in "):
            print(text.partition(" Traceback of ")[0].rstrip(".") + _operation(text), file=sys.stderr)
        else:
            shown(message, *rest, **kwargs)

    warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = shown


def _operation(trace: str) -> str:
    """The line of a trace of a forward call that asked for the operation; empty without a trace."""
    # the pieces that stand in for torch's own are as little the user's as those
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1] / "kernels"), "<")
    frames = [frame for frame in FRAME.finditer(trace) if not frame["file"].startswith(libraries)]
    if not frames:
        return ""
    last = frames[-1]
    return f" of {last['file']}, line {last['line']}: {last['code'].strip()}"


def _anomaly(error: Exception) -> str:
    """What to say where `detect_anomaly` has found something; nothing of other errors."""
    if not isinstance(error, RuntimeError) or "returned nan values in its" not in str(error):
        return ""
    return (
        f"the training of a client has diverged: {brief(error)} trainer.detect_anomaly stops at the first such client, "
        "and the line above says in which operation; without it the client is left out of its round. A lower learning "
        "rate of model.loop.client_optimizer may help."
    )


def _told_by_lightning(error: Exception) -> bool:
    """Whether Lightning itself has refused something."""
    frames = list(traceback.walk_tb(error.__traceback__))
    module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, ValueError | RuntimeError | TypeError | ImportError) and module.startswith("lightning.")
