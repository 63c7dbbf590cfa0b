"""Reads what Weights & Biases writes offline: the records of a `.wandb` file, which `wandb sync` uploads.

The file is a log in LevelDB's format behind a header of 7 bytes: blocks of 32 KiB, in each of them chunks with a
checksum (4 bytes), a length (2) and a type (1: whole, 2: first, 3: middle, 4: last of a record).
"""

import json
import struct
import time
from pathlib import Path

from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK, CHUNK = 7, 32 * 1024, struct.Struct("<IHB")


def records(file: Path) -> list[Record]:
    """The records of a file, in order."""
    data = file.read_bytes()
    assert data[:4] in (b":W&B", b"")
    found, parts, at = [], b"", HEADER
    while at + CHUNK.size <= len(data):
        if BLOCK - at % BLOCK < CHUNK.size:  # no room for a chunk: the rest of the block is empty
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = CHUNK.unpack_from(data, at)
        parts += data[at + CHUNK.size : at + CHUNK.size + length]
        at += CHUNK.size + length
        if kind in (1, 4):
            try:
                found.append(Record.FromString(parts))
            except DecodeError:  # still being written
                return found
            parts = b""
    return found


class OfflineRun:
    """A run in a folder `offline-run-...`: its id, config, history and files."""

    def __init__(self, folder: Path) -> None:
        (file,) = folder.glob("*.wandb")
        deadline = time.monotonic() + 120
        while not (found := records(file)) or not found[-1].HasField("exit"):  # W&B's own process may still write
            assert time.monotonic() < deadline, f"{file} has no end"
            time.sleep(0.05)
        self.folder, self.id, self.config, self.history, self.files = folder, "", {}, [], []
        for record in found:
            if record.HasField("run"):
                self.id, self.project, self.sweep = record.run.run_id, record.run.project, record.run.sweep_id
                self._update(record.run.config)
            self._update(record.config)
            if record.HasField("history"):
                items = record.history.item
                self.history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            self.files += [folder / "files" / file.path for file in record.files.files]

    def _update(self, config: object) -> None:
        self.config |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in config.update}

    def rows(self, key: str) -> list[dict[str, object]]:
        """Rows of the history that have a value under this name."""
        return [row for row in self.history if key in row]


def offline_runs(folder: Path) -> list[OfflineRun]:
    """The runs under `<folder>/wandb`, in the order they were started."""
    return [OfflineRun(run) for run in sorted((folder / "wandb").glob("offline-run-*"))]
