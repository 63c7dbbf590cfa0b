"""Let contenders in their own processes take turns round by round; each is judged by its best settings.

After a warm-up, all settings of all contenders take turns; a contender's best one has the smallest median. A setting
whose rounds differ too much is not judged, since a busy moment could make it the best or the worst. The number of
threads is a setting of a round if the library can change it, and otherwise of a process.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from tools.benchmarks.contest import TOLERANCE
from tools.benchmarks.peers.handover import Handover, save
from tools.benchmarks.remote import ROOT, Remote, RemoteError
from tools.benchmarks.workloads import Workload

PEERS = ("pfl", "flwr", "fedjax", "blazefl", "fluke")
"""Other simulators, by the names of their packages."""
OURS = ("loop", "trainer")
"""Our contenders; ratios are relative to the first one."""
SPREAD = 2.0
"""Settings are unusable if the upper quartile of their rounds is more than this many times the lower one."""
HOPELESS = 5.0
"""A setting is given up once it is this many times slower than another one of its contender in the warm-up: two threads
with little to do can be a hundred times slower beside a busy process."""
PROCESSES = (1, 2)
"""Numbers of processes to try; several processes have one thread each."""
XLA_ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}


@dataclass(frozen=True)
class Entry:
    """Describes a contender with its settings.

    Attributes:
        contender: name of the contender.
        label: description of the settings.
        command: command that starts the process, which entries with equal commands and numbers of processes share.
        processes: number of processes to start.
        settings: settings of a round.
        environment: environment variables of the process.
    """

    contender: str
    label: str
    command: tuple[str, ...]
    processes: int
    settings: tuple[tuple[str, Any], ...]
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Race:
    """Holds the result of a race.

    Attributes:
        workload: the workload.
        seconds: seconds of the timed rounds, by entry.
        processor_seconds: processor time of the same rounds in the entry's first process, by entry.
        heats: seconds of the fastest round of the warm-up, by entry; those without timed rounds were given up.
        starts: seconds from the start of the process to the end of the first round, by entry.
        memory: peak memory of the first process in megabytes, by entry.
        models: the parameters after the first round, by entry.
        failures: messages of contenders that could not take part.
    """

    workload: Workload
    seconds: dict[Entry, list[float]] = field(default_factory=dict)
    processor_seconds: dict[Entry, list[float]] = field(default_factory=dict)
    heats: dict[Entry, float] = field(default_factory=dict)
    starts: dict[Entry, float] = field(default_factory=dict)
    memory: dict[Entry, float] = field(default_factory=dict)
    models: dict[Entry, np.ndarray] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def contenders(self) -> list[str]:
        """Return the names of the contenders."""
        return list(dict.fromkeys(entry.contender for entry in self.seconds))

    def best(self, contender: str) -> Entry:
        """Return a contender's fastest entry by its median round; an unusable one only if all are."""
        entries = [entry for entry in self.seconds if entry.contender == contender]
        return min(entries, key=lambda entry: (not self.usable(entry), median(self.seconds[entry])))

    def spread(self, entry: Entry) -> float:
        """Return the upper quartile of an entry's rounds over the lower one."""
        low, _, high = _quartiles(self.seconds[entry])
        return high / low

    def usable(self, entry: Entry) -> bool:
        """Return whether an entry's rounds are alike enough to judge it by."""
        return self.spread(entry) <= SPREAD

    def milliseconds(self, entry: Entry) -> float:
        """Return an entry's median round time in milliseconds."""
        return median(self.seconds[entry]) * 1e3

    def ratios(self, contender: str, ours: str) -> tuple[float, float, float]:
        """Return quartiles and median of a contender's round time over ours, round by round, in ascending order."""
        pairs = zip(self.seconds[self.best(contender)], self.seconds[self.best(ours)], strict=True)
        return _quartiles([theirs / our for theirs, our in pairs])

    def difference(self, contender: str) -> float:
        """Return the largest difference of a parameter from our loop's model after round one, over all entries."""
        ours = next(model for entry, model in self.models.items() if entry.contender == OURS[0])
        theirs = [model for entry, model in self.models.items() if entry.contender == contender]
        return max(float(np.abs(model - ours).max()) for model in theirs)

    @property
    def agrees(self) -> bool:
        """Return whether all contenders have the same model."""
        return all(self.difference(name) <= TOLERANCE for name in self.contenders)


def interpreters(given: Iterable[str] = ()) -> dict[str, str]:
    """Return the Python of each installed peer by name.

    Args:
        given: interpreters as `NAME=PATH`; otherwise those of `make bench-peers`, or this one if it has the peer.
    """
    found = {name: sys.executable for name in PEERS if find_spec(name) is not None}
    made = {name: ROOT / ".venv-peers" / name / "bin" / "python" for name in PEERS}
    found |= {name: str(path) for name, path in made.items() if path.exists()}
    return found | dict(item.split("=", 1) for item in given)


def entries(workload: Workload, chunk_size: int, pythons: dict[str, str], handover: str, folder: Path) -> list[Entry]:
    """Return all contenders of a workload with all their settings.

    Args:
        workload: the workload.
        chunk_size: chunk size of our contender by the Trainer.
        pythons: interpreters of the peers.
        handover: path of the peers' common start.
        folder: folder of the Trainer's store.
    """
    cores = os.cpu_count() or 1
    chosen: list[Entry] = []

    def enter(
        contender: str,
        command: Iterable[str],
        processes: int,
        label: str = "",
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        both = (f"{processes} processes" if processes > 1 else f"{settings['threads']} threads") + label
        variables = tuple((environment or {}).items())
        chosen.append(Entry(contender, both, tuple(command), processes, tuple(settings.items()), variables))

    def module(python: str, name: str, *arguments: object) -> list[str]:
        return [python, "-m", f"tools.benchmarks.peers.{name}", *map(str, arguments)]

    # threads of one process, or one thread in each of several processes
    ways = [(1, threads) for threads in sorted({1, min(2, cores)})] + [(p, 1) for p in PROCESSES[1:] if p <= cores]
    for processes, threads in ways:
        if "bare" in workload.peers:
            enter("bare", module(sys.executable, "run_torch", "loops", workload.name), processes, threads=threads)
        if "pfl" in workload.peers and "pfl" in pythons:
            enter("pfl", module(pythons["pfl"], "run_pfl", handover), processes, threads=threads)
        if "fedjax" in workload.peers and "fedjax" in pythons and processes == 1:
            environment = XLA_ONE_THREAD if threads == 1 else {}
            enter("fedjax", module(pythons["fedjax"], "run_fedjax", handover), 1, "", environment, threads=threads)
        if "flwr" in workload.peers and "flwr" in pythons and processes == 1:
            actors = cores // threads
            command = module(pythons["flwr"], "run_flwr", handover, actors, cores)
            enter("flwr", command, 1, f" in each of {actors} actors", threads=threads)
        if "fluke" in workload.peers and "fluke" in pythons and processes == 1:
            enter("fluke", module(pythons["fluke"], "run_fluke", handover), 1, threads=threads)
        if "blazefl" in workload.peers and "blazefl" in pythons:
            # several clients at a time are threads of Python
            command, label = module(pythons["blazefl"], "run_blazefl", handover, processes), f"{processes} at a time, "
            chosen.append(Entry("blazefl", f"{label}{threads} threads", tuple(command), 1, (("threads", threads),)))
        command = module(sys.executable, "run_torch", "loops", workload.name)
        sizes = {min(size, -(-workload.clients // processes)) for size in workload.chunk_sizes}
        for size in sorted(sizes):
            enter("loop", command, processes, f", chunk {size}", threads=threads, chunk_size=size)
        size = min(chunk_size, -(-workload.clients // processes))
        command = module(sys.executable, "run_torch", "trainer", workload.name, size, folder / f"store{processes}")
        enter("trainer", command, processes, f", chunk {size}", threads=threads)
    return chosen


def run(workload: Workload, chunk_size: int, pythons: dict[str, str], rounds: int, heats: int) -> Race:
    """Run a workload's race.

    Args:
        workload: the workload.
        chunk_size: chunk size of our contender by the Trainer.
        pythons: interpreters of the installed peers.
        rounds: number of timed rounds of each entry.
        heats: number of rounds of each entry before these, to warm up.
    """
    race = Race(workload)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        handover = str(folder / "handover.npz")
        save(handover, handed_over(workload))
        remotes: dict[Entry, Remote] = {}
        chosen = entries(workload, chunk_size, pythons, handover, folder)
        for _, group in itertools.groupby(sorted(chosen, key=_process), key=_process):
            together = list(group)
            first = together[0]
            remote = Remote(first.command, folder, first.processes, dict(first.environment))
            stack.callback(remote.close)
            try:
                warm_up(race, remote, together, heats)
            except RemoteError as error:
                race.failures[f"{first.contender} ({first.label})"] = str(error)
                remote.close()
            else:
                remotes |= dict.fromkeys(together, remote)
        judged = [entry for entry in remotes if race.heats[entry] <= HOPELESS * _fastest(race, entry.contender)]
        for remote in set(remotes.values()) - {remotes[entry] for entry in judged}:
            remote.close()
        for _ in range(rounds):
            for entry in judged:
                result = remotes[entry].round({**dict(entry.settings), "save": False})
                race.seconds.setdefault(entry, []).append(result.seconds)
                race.processor_seconds.setdefault(entry, []).append(result.processor_seconds)
                race.memory[entry] = result.memory_mb
    return race


def handed_over(workload: Workload) -> Handover:
    """Return the peers' common start."""
    clients = [(x.numpy(), y.numpy()) for x, y in workload.data()]
    parameters = [p.detach().numpy() for p in workload.model().parameters()]
    kind = workload.kind
    return Handover(workload.name, kind, clients, parameters, workload.batch_size, workload.lr, workload.momentum)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def _process(entry: Entry) -> tuple[int, tuple[str, ...], tuple[tuple[str, str], ...]]:
    return entry.processes, entry.command, entry.environment


def _fastest(race: Race, contender: str) -> float:
    return min(seconds for entry, seconds in race.heats.items() if entry.contender == contender)


def warm_up(race: Race, remote: Remote, together: list[Entry], heats: int) -> None:
    """Run rounds of a new process, whose settings take turns; those of hopeless ones are skipped.

    Args:
        race: receives the times, and each contender's first model.
        remote: the process.
        together: its entries.
        heats: number of turns.
    """
    seconds: dict[Entry, list[float]] = {entry: [] for entry in together}
    named: set[str] = set()
    for _ in range(heats):
        for entry in together:
            new = entry.contender not in named
            # not by its first rounds: what a process makes once, such as traces, falls to whichever setting is first
            if len(seconds[entry]) >= max(2, heats // 2) and min(seconds[entry]) > HOPELESS * min(
                map(min, seconds.values())
            ):
                continue
            seconds[entry].append(remote.round({**dict(entry.settings), "save": new}).seconds)
            if new:
                named.add(entry.contender)
                race.models[entry] = remote.model()
    assert remote.start_seconds is not None
    race.starts[together[0]] = remote.start_seconds
    for entry in together:
        race.heats[entry] = min(seconds[entry][min(3, heats - 1) :] or seconds[entry])
