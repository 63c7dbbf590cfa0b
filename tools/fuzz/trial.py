"""Pass damaged files to their readers in a separate process, which may crash or hang."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np

from tools.fuzz.readers import READERS, Sample, samples

Status = Literal["refused", "read", "failed", "crashed", "hung"]
"""Refused by a `FlowError`; read to the end; failed by another error, or left files; the process ended; no response."""

MEMORY = 3 << 30
"""Bytes that a reader may allocate beyond those of the process at its start."""

SMALL = 64 << 20
"""Bytes that every file may expand to here, so that limits apply below `MEMORY`."""


@dataclass(frozen=True)
class Outcome:
    """Holds the outcome of a case.

    Attributes:
        reader: name of the reader.
        case: number of the case.
        status: how the case ended.
        message: the error, or its traceback.
        seconds: duration of the case.
    """

    reader: str
    case: int
    status: Status
    message: str
    seconds: float


def damaged_sample(reader: str, case: int, seed: int) -> tuple[Sample, bytes]:
    """Create the file of a case, a function of the arguments.

    Args:
        reader: name of the reader.
        case: number of the case.
        seed: seed of all cases.

    Returns:
        The intact file and the damaged one.
    """
    random = np.random.default_rng((seed, list(READERS).index(reader), case))
    known = samples(reader)
    sample, other = known[case % len(known)], known[random.integers(len(known))]
    same_kind = other if other.name == sample.name else sample
    damage = sample.damages[random.integers(len(sample.damages))]
    return sample, damage(sample.content, same_kind.content, random)


def attempt(reader: str, case: int, seed: int) -> Outcome:
    """Pass the file of a case to its reader, in this process.

    Args:
        reader: name of the reader.
        case: number of the case.
        seed: seed of all cases.

    Returns:
        The outcome: refused, read or failed.
    """
    from flow_pl.errors import FlowError

    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    status: Status = "read"
    message = ""
    try:
        sample, content = damaged_sample(reader, case, seed)
        inner = folder / "data"
        inner.mkdir()
        (inner / sample.name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sample.read(inner)
    except FlowError as error:
        status, message = "refused", str(error)
        if not message.isprintable() or not 20 < len(message) < 2000:
            status, message = "failed", f"no clear message: {message!r}"
    except BaseException:
        status, message = "failed", traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(reader, case, status, message, time.monotonic() - start)


def outcomes(cases: Sequence[tuple[str, int]], seed: int, timeout: float, log: Path) -> Iterator[Outcome]:
    """Pass the files of all cases to their readers, one after the other.

    Args:
        cases: readers and numbers of cases.
        seed: seed of all cases.
        timeout: seconds after which a reader counts as hung.
        log: file of the readers' output, including the stack of a crash.

    Yields:
        The outcome of each case.
    """
    left = list(cases)
    while left:
        with _process(seed, log) as (process, pipe):
            while left:
                reader, case = left.pop(0)
                start = time.monotonic()
                pipe.send((reader, case))
                answered = pipe.poll(timeout)
                try:
                    if answered:
                        yield pipe.recv()
                        continue
                    yield Outcome(reader, case, "hung", f"no answer in {timeout} s", time.monotonic() - start)
                except EOFError:
                    process.join(10)
                    ended = f"the process ended with status {process.exitcode}; see {log}"
                    yield Outcome(reader, case, "crashed", ended, time.monotonic() - start)
                break


@contextlib.contextmanager
def _process(seed: int, log: Path) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    spawned = multiprocessing.get_context("spawn")
    ours, theirs = spawned.Pipe()
    process = spawned.Process(target=_work, args=(theirs, seed, str(log)), daemon=True)
    process.start()
    theirs.close()
    try:
        ours.poll(300)
        ours.recv()  # everything is imported
        yield process, ours
    finally:
        ours.close()  # the pipe's end stops it, unless it hangs
        process.join(5)
        process.kill()
        process.join()


def _work(pipe: Connection, seed: int, log: str) -> None:
    import resource

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_OFFLINE"] = "1"

    import datasets

    from flow_pl.data.store import limits

    datasets.disable_progress_bars()
    limits.ALWAYS_ALLOWED = SMALL
    for reader in READERS:
        for sample in samples(reader):
            with tempfile.TemporaryDirectory() as folder:
                inner = Path(folder, "data")
                inner.mkdir()
                (inner / sample.name).write_bytes(sample.content)
                sample.read(inner)  # intact files are read, so that everything is imported
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            reader, case = pipe.recv()
            pipe.send(attempt(reader, case, seed))
