"""The sdist and the wheel hold all that a run needs, and nothing at the top level beside the package."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("flow_pl", "callbacks", "configs", "pyproject.toml", "README.md", "LICENSE")


def call(*words, cwd, **environment):
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_runs_from_an_empty_folder(tmp_path):
    """Built from the sdist; links to callbacks and configurations have become folders. Nothing is downloaded."""
    pytest.importorskip("build", reason="build is not installed")
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:  # a copy, as setuptools writes into the folder
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), cwd=source)
    (wheel,), (sdist,) = (list((tmp_path / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    with tarfile.open(sdist) as archive:
        names = [Path(name).parts[1:] for name in archive.getnames()]
    assert ("flow_pl", "callbacks", "__init__.py") in names
    assert ("LICENSE",) in names
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    version = wheel.name.split("-")[1]
    assert {path.name for path in installed.iterdir()} == {"flow_pl", f"flow_pl-{version}.dist-info"}
    empty = tmp_path / "empty"
    empty.mkdir()
    paths = {"PYTHONPATH": str(installed), "FLOW_PL_CACHE": str(tmp_path / "cache")}
    # without the current folder on the path, as the script that pip writes
    run = ["-c", "import sys; sys.path.remove(''); from flow_pl.__main__ import main; main()"]
    where = call(sys.executable, "-c", "import flow_pl; print(flow_pl.__file__)", cwd=empty, **paths)
    assert Path(where.strip()).is_relative_to(installed)
    configurations = call(sys.executable, *run, "configs", cwd=empty, **paths)
    assert "task/digits" in configurations
    fit = ["fit", "-c", "task/digits", "-c", "method/flow", "--trainer.max_epochs", "1", "--trainer.accelerator=cpu"]
    call(sys.executable, *run, *fit, "--trainer.devices=1", cwd=empty, **paths)
    assert (empty / "runs/digits/flow/checkpoints/last.ckpt").exists()
