"""A client's state on its node's disk."""

import pytest
import torch

from flow_pl.deploy.private_state import PrivateState
from flow_pl.errors import DataError


def test_private_state_goes_on_from_the_round_that_the_server_has_taken(tmp_path):
    initial = {"personal": {"w": torch.zeros(2)}}
    state = PrivateState(tmp_path, 5, 0)
    assert torch.equal(state.read(-1, initial)["personal"]["w"], torch.zeros(1, 2))
    for round_, taken in ((0, -1), (1, 0), (2, 1)):
        state.write(round_, {"personal": {"w": torch.full((1, 2), float(round_))}}, taken)
    assert sorted(path.name for path in state.folder.iterdir()) == ["round-1.pt", "round-2.pt"]
    assert state.read(1, initial)["personal"]["w"].tolist() == [[1, 1]]
    with pytest.raises(DataError, match="state of round 0 is not in"):
        state.read(0, initial)
    (state.folder / "round-2.pt").write_bytes(b"half")
    with pytest.raises(DataError, match="damaged"):
        state.read(2, initial)
    with pytest.raises(DataError, match="of another method"):
        state.read(1, {"personal": {"w": torch.zeros(3)}})
