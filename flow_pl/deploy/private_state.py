"""Keep a client's state on its node's disk, in one file for each of its last rounds, written atomically.

The server sends the last round whose update it has accepted, and the client resumes from there: the state of a round
that the server has not accepted, since it was interrupted or the reply came late, does not count, as in simulation.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch

from flow_pl.errors import DataError, brief
from flow_pl.utils.files import replacing
from flow_pl.utils.groups import Groups


class PrivateState:
    """The private groups of one client of one run.

    Args:
        folder: folder of the node's states.
        run: number of the run.
        client: number of the client.
    """

    def __init__(self, folder: Path, run: int, client: int) -> None:
        self.folder = folder / f"run-{run}" / f"client-{client}"

    def read(self, round_: int, initial: Groups) -> Groups:
        """Read the client's state at the end of a round.

        Args:
            round_: the round; -1 if the client has not been trained yet.
            initial: its initial state, for names and shapes.

        Returns:
            The client's groups with a client axis [1, ...], which may be changed.

        Raises:
            DataError: the file is gone or damaged.
        """
        if round_ < 0:
            return {name: {key: p[None].clone() for key, p in group.items()} for name, group in initial.items()}
        path = self._path(round_)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise DataError(
                f"the client's state of round {round_} is not in {self.folder}: start the node with its earlier state "
                "folder, or start a new run"
            ) from error
        except Exception as error:
            raise DataError(f"{path} is damaged ({brief(error)}): start a new run") from error
        groups: Groups = {}
        for name, group in initial.items():
            for key, p in group.items():
                tensor = saved.get(name, {}).get(key)
                if tensor is None or tensor.shape != p.shape:
                    raise DataError(f"{path} is of another method or backbone: start a new run")
                groups.setdefault(name, {})[key] = tensor[None].to(p.device)
        return groups

    def write(self, round_: int, kept: Groups, taken: int) -> None:
        """Write groups [1, ...] at the end of a round.

        Args:
            round_: the round.
            kept: the groups.
            taken: the last round whose update the server has accepted, whose file stays; -1 for none.

        Raises:
            FlowError: the disk is full, or the folder is not writable.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(round_)) as file:
            torch.save({name: {key: p[0].cpu() for key, p in group.items()} for name, group in kept.items()}, file)
        for path in self.folder.glob("round-*.pt"):
            found = re.fullmatch(r"round-(\d+)", path.stem)
            if found and int(found[1]) not in (round_, taken):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()

    def _path(self, round_: int) -> Path:
        return self.folder / f"round-{round_}.pt"
