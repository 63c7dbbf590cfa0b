"""Settings of the whole suite."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small tensors: a second thread costs more than it brings, above all beside another process."""
    torch.set_num_threads(1)
