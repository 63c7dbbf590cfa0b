"""Checkpoint files: whole or not there, refused by name, the last good one offered."""

import contextlib
import errno
import os
import resource
import subprocess
import time
from pathlib import Path

import lightning
import pytest
import torch

from flow_pl.__main__ import main
from flow_pl.errors import ConfigurationError, FlowError
from flow_pl.utils.checkpoints import WholeCheckpointIO, look_at, resumed_checkpoint
from flow_pl.utils.files import write_text
from tests.test_cli import config, fails  # noqa: F401 (a fixture)


def checkpoint(step=7, size=1000):
    return {"flow_pl": {}, "state_dict": {"w": torch.arange(float(size))}, "global_step": step}


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint, with one of an earlier round beside it."""
    folder = tmp_path / "checkpoints"
    for name, step in (("best", 5), ("last", 7)):
        WholeCheckpointIO().save_checkpoint(checkpoint(step), folder / f"{name}.ckpt")
    return folder / "last.ckpt"


def test_a_checkpoint_comes_back_and_nothing_is_left_beside_it(saved):
    loaded = WholeCheckpointIO().load_checkpoint(saved)
    assert loaded["global_step"] == 7
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(1000.0))
    assert sorted(path.name for path in saved.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_write_that_is_broken_off_leaves_the_last_checkpoint(saved, monkeypatch):
    before = saved.read_bytes()

    def half(content, file):
        file.write(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        WholeCheckpointIO().save_checkpoint(checkpoint(8), saved)
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 2


@pytest.mark.parametrize("size", [2**14, 2**18])
def test_a_disk_without_room_leaves_the_last_checkpoint_and_is_told(saved, size):
    """A limit of the size of files fails as a full disk does: in the middle of a write."""
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
    try:
        with pytest.raises(FlowError, match=r"last\.ckpt cannot be written \(File too large\): free space") as failed:
            WholeCheckpointIO().save_checkpoint(checkpoint(8, size), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "--ckpt_path last resumes" in str(failed.value)
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 2


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to_is_told(saved, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "replace", refuse)
    for write in (
        lambda: WholeCheckpointIO().save_checkpoint(checkpoint(), saved),
        lambda: write_text(saved, "anything"),
    ):
        with pytest.raises(FlowError, match=rf"last\.ckpt cannot be written \({os.strerror(error)}\)"):
            write()
    assert len(list(saved.parent.iterdir())) == 2
    monkeypatch.undo()
    with pytest.raises(FlowError, match=r"/proc/nowhere/last\.ckpt cannot be written"):
        WholeCheckpointIO().save_checkpoint(checkpoint(), Path("/proc/nowhere/last.ckpt"))


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no permission to mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_real_disk_that_is_full_or_read_only(disk):
    io, path = WholeCheckpointIO(), disk / "checkpoints" / "last.ckpt"
    io.save_checkpoint(checkpoint(), path)
    for size in (40_000, 100_000, 1_000_000):  # 256 kB hold one of the first, but not two
        for _ in range(2):
            with contextlib.suppress(FlowError):
                io.save_checkpoint(checkpoint(8, size), path)
        assert io.load_checkpoint(path)["global_step"] in (7, 8)
        assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    with pytest.raises(FlowError, match="No space left on device"):
        io.save_checkpoint(checkpoint(8, 1_000_000), path)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(FlowError, match="Read-only file system"):
        io.save_checkpoint(checkpoint(9), path)
    assert io.load_checkpoint(path)["global_step"] in (7, 8)


class _Code:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def _flipped(content):
    """One bit of the tensor."""
    at = content.index(torch.arange(1000.0).numpy().tobytes()[400:480])
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "is damaged or truncated"),
        (lambda content: content[: len(content) // 2], "is damaged or truncated"),
        (lambda content: b"", "is damaged or truncated"),
        (lambda content: content[:-2000] + b"\0" * 2000, "is damaged or truncated"),
        (_flipped, r"is damaged or truncated \(.* has a wrong checksum\)"),
        (lambda content: b"no checkpoint at all", "is damaged or truncated"),
        ({"state_dict": {"w": torch.zeros(2)}}, "was not written by `flow-pl fit`"),
        (torch.zeros(3), "was not written by `flow-pl fit`"),
        (_Code(), "was not written by `flow-pl fit`"),
        (None, "does not exist"),
    ],
)
def test_a_torn_or_foreign_checkpoint_is_refused_by_name_and_the_last_good_one_offered(
    saved, monkeypatch, damage, message
):
    monkeypatch.chdir(saved.parent)
    if damage is None:
        saved.unlink()
    elif callable(damage):
        saved.write_bytes(damage(saved.read_bytes()))
    else:
        torch.save(damage, saved)
    with pytest.raises(ConfigurationError, match=message) as refused:
        WholeCheckpointIO().load_checkpoint(saved)
    assert f"the checkpoint {saved} " in str(refused.value)
    assert f"such as {saved.with_name('best.ckpt')} (round 5), which can be loaded" in str(refused.value)
    assert not Path("executed").exists()
    saved.with_name("best.ckpt").write_bytes(b"torn too")
    with pytest.raises(ConfigurationError, match="none beside this one can be loaded"):
        WholeCheckpointIO().load_checkpoint(saved)


def test_which_file_a_fit_goes_on_from(saved, monkeypatch):
    root = saved.parent.parent
    last = lightning.pytorch.callbacks.ModelCheckpoint(saved.parent)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[last], default_root_dir=root, enable_progress_bar=False
    )
    assert resumed_checkpoint(trainer, None) is None
    assert resumed_checkpoint(trainer, "hpc") is None
    assert resumed_checkpoint(trainer, "last") == saved
    assert resumed_checkpoint(trainer, saved.with_name("best.ckpt")) == saved.with_name("best.ckpt")
    for number in (2, 10):
        WholeCheckpointIO().save_checkpoint(checkpoint(number), root / f"hpc_ckpt_{number}.ckpt")
    assert resumed_checkpoint(trainer, "hpc") == root / "hpc_ckpt_10.ckpt"
    assert resumed_checkpoint(trainer, None) is None, "not on SLURM"
    time.sleep(0.02)
    WholeCheckpointIO().save_checkpoint(checkpoint(9), saved.with_name("last-v1.ckpt"))
    assert resumed_checkpoint(trainer, "last") == saved.with_name("last-v1.ckpt")
    assert look_at(resumed_checkpoint(trainer, "last"))["global_step"] == 9


def test_what_a_kill_leaves_of_a_slurm_checkpoint_is_not_taken_for_one(tmp_path):
    """Lightning looks for `hpc_ckpt_` anywhere in a name."""
    written = []

    class Watch:
        def __reduce__(self):
            written.extend(path.name for path in tmp_path.iterdir())
            return (dict, ())

    WholeCheckpointIO().save_checkpoint({"watch": Watch()}, tmp_path / "hpc_ckpt_3.ckpt")
    assert written
    assert not any("hpc_ckpt_" in name or name.endswith(".ckpt") for name in written)


@pytest.mark.slow
def test_a_torn_last_checkpoint_through_the_command_line(config, tmp_path, capsys):  # noqa: F811
    main(["fit", "--config", str(config)])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    for command, given in (("fit", "last"), ("fit", last), ("test", last)):
        capsys.readouterr()
        code, error = fails(capsys, command, "--config", config, "--ckpt_path", given)
        assert code == 1
        assert f"the checkpoint {last} is damaged or truncated" in error
        assert "best.ckpt (round " in error
        assert "Traceback" not in error
    last.unlink()
    main(["fit", "--config", str(config), "--ckpt_path", "last"])  # there is none: anew
    assert last.read_bytes()
