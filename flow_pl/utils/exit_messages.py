"""End a failed command with one message and an exit status instead of a traceback."""

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

RESUME = "saved checkpoints are intact; the same command with --ckpt_path last resumes from the last one"

LOST = {
    "DataLoader worker (pid": "a data-loading worker was killed, most often because memory ran out; "
    "lower data.num_workers or data.chunk_size",
    "Connection closed by peer": "another process of the run has ended; see its output for the reason",
    "Connection reset by peer": "another process of the run has ended; see its output for the reason",
}
"""Meaning of errors whose message contains these words; torch has no exception types for them."""

FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+), in .+\n(?P<code>.*)')


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Exit with one message and status 1 on errors in the context that the user can correct.

    SIGTERM exits with status 143.
    """
    _silence_advertisements()
    try:
        with _short_warnings():
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
        if cause is None and not _raised_by_lightning(error) and not _anomaly(error):
            raise
        print(f"error: {_anomaly(error) or (brief(error) if cause is None else cause)}", file=sys.stderr)
        raise SystemExit(1) from None


def _silence_advertisements() -> None:
    """Suppress output that does not concern users: tips for other products, notes to Lightning's developers."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    # a command such as report runs another with arguments of its own
    warnings.filterwarnings("ignore", message=r"LightningCLI's args parameter")
    # shown when an earlier run is about to be moved aside or continued
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    # a model is never sharded here, see trainer_settings
    warnings.filterwarnings("ignore", message=r"You're using the WeightAveraging callback with a model that overrides")
    for module in ("trainer.connectors.logger_connector.logger_connector", "utilities.rank_zero"):
        logging.getLogger(f"lightning.pytorch.{module}").addFilter(lambda record: "Tip:" not in record.getMessage())


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show this package's own kinds of warnings in the context as one line, without the place in its code.

    The traces that `detect_anomaly` prints are shortened to the line of the user's code.
    """
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **kwargs: Any) -> None:
        text = str(message)
        if text.startswith("Error detected in "):
            print(text.partition(" Traceback of ")[0].rstrip(".") + _operation(text), file=sys.stderr)
        elif category.__module__.startswith("flow_pl."):
            print(f"warning: {text}", file=sys.stderr)
        else:
            shown(message, category, *rest, **kwargs)

    warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = shown


def _operation(trace: str) -> str:
    """Return the line in the trace of a forward call that requested the operation; empty without a trace."""
    # the kernels replace torch's functions, so they are not the user's code either
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1] / "kernels"), "<")
    frames = [frame for frame in FRAME.finditer(trace) if not frame["file"].startswith(libraries)]
    if not frames:
        return ""
    last = frames[-1]
    return f" of {last['file']}, line {last['line']}: {last['code'].strip()}"


def _anomaly(error: Exception) -> str:
    """Return the message for an anomaly found by `detect_anomaly`; empty for other errors."""
    if not isinstance(error, RuntimeError) or "returned nan values in its" not in str(error):
        return ""
    return (
        f"the training of a client has diverged: {brief(error)} trainer.detect_anomaly stops at the first such "
        "client; the line above names the operation. Without it, the client is excluded from its round. A lower "
        "learning rate of model.loop.client_optimizer may help."
    )


def _raised_by_lightning(error: Exception) -> bool:
    """Return whether Lightning itself raised the error."""
    frames = list(traceback.walk_tb(error.__traceback__))
    module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, ValueError | RuntimeError | TypeError | ImportError) and module.startswith("lightning.")
