from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from flow_pl.data import ClientStore, ClientStoreWriter
from flow_pl.data.store.client_store import Role

MakeStore = Callable[..., ClientStore]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """A store of clients of the given sizes; row r of client c has the features [c, r] and the label r % 3."""

    def make(
        sizes: Sequence[int],
        unlabelled: Sequence[int] | None = None,
        val_rows: Sequence[int | None] | None = None,
        test_rows: Sequence[int | None] | None = None,
        roles: Sequence[Role] | None = None,
    ) -> ClientStore:
        path = tmp_path / "store"
        with ClientStoreWriter(path) as writer:
            for client, size in enumerate(sizes):
                rows = np.arange(size)
                y = rows % 3
                if unlabelled is not None:
                    y[size - unlabelled[client] :] = -1
                x = np.stack([np.full(size, client), rows], axis=1).astype(np.float32)
                writer.add(
                    f"client {client}",
                    x,
                    y,
                    val_rows[client] if val_rows else None,
                    test_rows[client] if test_rows else None,
                    roles[client] if roles else "train",
                )
        return ClientStore.open(path)

    return make
