"""What is wrong with settings, arrays, files and checkpoints ends a command with one clear message."""

import numpy as np
import pytest

from flow_pl.__main__ import main
from tests.test_cli import _array_config, config, fails  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--model.method", "NoSuchMethod"], 2, "NoSuchMethod"),
        (["--model.method.no_such_setting", "1"], 2, "no_such_setting"),
        (["--data.no_such_key", "1"], 2, "no_such_key"),
        (["--data.cohort_size", "0"], 1, "cohort_size is 0"),
        pytest.param(["--data.cohort_size", "-3"], 1, "cohort_size is -3", marks=pytest.mark.slow),
        pytest.param(["--data.chunk_size", "0"], 1, "chunk_size is 0", marks=pytest.mark.slow),
        (["--data.cohort_size", "7"], 1, "cohort_size is 7"),
        (["--data.new_client_fraction", "1.5"], 1, "new_client_fraction is 1.5"),
        pytest.param(["--model.loop.batch_size", "0"], 1, "batch_size is 0", marks=pytest.mark.slow),
        pytest.param(["--model.loop.local_epochs", "-1"], 1, "local_epochs is -1", marks=pytest.mark.slow),
        pytest.param(["--model.method.split", "thirds"], 2, "thirds", marks=pytest.mark.slow),
        (["--model.backbone.in_features", "7"], 1, "features have shape [6]"),
        (["--model.backbone.num_classes", "2"], 1, "labels run from 0 to 2"),
        (["--model.loop.client_optimizer", "torch.optim.LBFGS"], 1, "cannot train clients side by side"),
        (["--ckpt_path", "nowhere.ckpt"], 1, "nowhere.ckpt"),
    ],
    ids=lambda value: "_".join(value).replace("-", "") if isinstance(value, list) else None,
)
def test_bad_settings_end_with_one_clear_message(config, capsys, options, status, message):  # noqa: F811
    code, error = fails(capsys, "fit", "--config", config, *options)
    assert code == status
    assert message in error
    assert "Traceback" not in error


def _arrays(**changes):
    random = np.random.default_rng(0)
    arrays = {"x": random.normal(size=(40, 6)).astype("f4"), "y": np.arange(40) % 3, "client": np.arange(40) % 8}
    return {**arrays, **{name: change(arrays[name]) for name, change in changes.items()}}


def _with(value, row):
    def change(array):
        array = array.copy()
        array[row] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": _with(np.nan, 9)}, "'x' has no value (NaN or null) in row 9"),
        pytest.param({"y": lambda y: y[:-1]}, "39", marks=pytest.mark.slow),
        pytest.param({"y": _with(7, 12)}, "7", marks=pytest.mark.slow),
        ({"y": _with(-1, slice(None))}, "has a label: check where the labels come from"),
        pytest.param({"x": lambda x: x[:, :5]}, r"shape [5]", marks=pytest.mark.slow),
    ],
    ids=["nan", "lengths", "label", "no labelled example", "features"],
)
def test_bad_arrays_end_with_one_clear_message(config, tmp_path, capsys, changes, message):  # noqa: F811
    np.savez(tmp_path / "bad.npz", **_arrays(**changes))
    path = _array_config(config, tmp_path / "bad.npz", num_classes=3)
    code, error = fails(capsys, "fit", "--config", path)
    assert code == 1
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_bad_files_end_with_one_clear_message(config, tmp_path, capsys, damage):  # noqa: F811
    file = tmp_path / "bad.npz"
    if damage == "truncated":
        np.savez(file, **_arrays())
        file.write_bytes(file.read_bytes()[:700])
    code, error = fails(capsys, "fit", "--config", _array_config(config, file))
    assert code == 1
    assert "bad.npz" in error
    assert "Traceback" not in error


def test_a_checkpoint_of_another_method_or_a_truncated_one_ends_with_one_clear_message(config, tmp_path, capsys):  # noqa: F811
    main(["fit", "--config", str(config)])
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    capsys.readouterr()
    code, error = fails(capsys, "test", "--config", config, "--ckpt_path", best, "--model.method", "FedAvg")
    assert (code, "written by the method Flow" in error) == (1, True)
    best.write_bytes(best.read_bytes()[:1000])
    code, error = fails(capsys, "test", "--config", config, "--ckpt_path", best)
    assert code == 1
    assert "best.ckpt" in error
    assert "Traceback" not in error
