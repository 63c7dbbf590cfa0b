"""Giving damaged files to their readers, in a process of its own, which may crash or hang."""

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
"""By an error of ours; to the end; by any other error, or with something left behind; the process ended; no answer."""

MEMORY = 3 << 30
"""Bytes that a reader may take beyond what the process has when it starts."""

SMALL = 64 << 20
"""What every file may expand to here, so that the limits come into force below `MEMORY`."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        reader: name of the reader.
        case: number of the case.
        status: how it ended.
        message: the error, or its traceback.
        seconds: that it took.
    """

    reader: str
    case: int
    status: Status
    message: str
    seconds: float


def damaged_sample(reader: str, case: int, seed: int) -> tuple[Sample, bytes]:
    """The file of a case: the same for the same arguments.

    Args:
        reader: name of the reader.
        case: number of the case.
        seed: of all cases.

    Returns:
        The whole file and the damaged one.
    """
    random = np.random.default_rng((seed, list(READERS).index(reader), case))
    known = samples(reader)
    sample, other = known[case % len(known)], known[random.integers(len(known))]
    same_kind = other if other.name == sample.name else sample
    damage = sample.damages[random.integers(len(sample.damages))]
    return sample, damage(sample.content, same_kind.content, random)


def attempt(reader: str, case: int, seed: int) -> Outcome:
    """Give the file of a case to its reader, in this process.

    Args:
        reader: name of the reader.
        case: number of the case.
        seed: of all cases.

    Returns:
        What became of it: refused, read or failed.
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
    """Give the files of all cases to their readers, one after the other.

    Args:
        cases: readers and numbers of cases.
        seed: of all cases.
        timeout: seconds after which a reader hangs.
        log: file that gets what the process of the readers says, a crash's stack among it.

    Yields:
        What became of each.
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
        ours.recv()  # it has imported everything
        yield process, ours
    finally:
        ours.close()  # which ends it, unless it hangs
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
                sample.read(inner)  # whole files are read, and everything is imported
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            reader, case = pipe.recv()
            pipe.send(attempt(reader, case, seed))
