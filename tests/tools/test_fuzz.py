"""A few damaged files for every reader; `make fuzz` has thousands."""

import pytest

from tools.fuzz.readers import READERS
from tools.fuzz.trial import damaged_sample, outcomes

pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("flwr_datasets", reason="flwr-datasets is not installed")

CASES = 40


@pytest.mark.slow
def test_damaged_files_are_refused_by_our_errors_or_read(tmp_path):
    """In a process of its own, which first reads every whole file."""
    cases = [(reader, case) for reader in READERS for case in range(CASES)]
    found = list(outcomes(cases, seed=1, timeout=60, log=tmp_path / "log.txt"))
    assert [(outcome.reader, outcome.case) for outcome in found] == cases
    wrong = [outcome for outcome in found if outcome.status not in ("refused", "read")]
    assert not wrong, "\n".join(f"{one.reader} {one.case}: {one.status}\n{one.message}" for one in wrong)
    for reader in READERS:
        statuses = {outcome.status for outcome in found if outcome.reader == reader}
        assert "refused" in statuses, f"{reader}: the damage does no harm"


@pytest.mark.parametrize("reader", READERS)
def test_a_case_is_the_same_for_the_same_seed_and_another_for_others(reader):
    (sample, first), (_, again) = (damaged_sample(reader, 5, 0) for _ in range(2))
    assert first == again
    assert first != sample.content
    assert len({damaged_sample(reader, 5, seed)[1] for seed in range(4)}) > 1
