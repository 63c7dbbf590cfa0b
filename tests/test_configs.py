"""Every shipped configuration parses and runs, and says what each of its keys means."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from flow_pl.cli import run

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.yaml"))
PIECES = sorted((ROOT / "configs").glob("**/*.yaml"))


def name(path):
    return str(path.relative_to(ROOT / "configs"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Options that give a configuration data of the shape it expects, where it reads a file of the user's."""
    folder = tmp_path_factory.mktemp("inputs")
    random = np.random.default_rng(0)
    n = 40 * 12
    x = random.integers(0, 256, size=(n, 28, 28), dtype=np.uint8)
    np.savez(folder / "data.npz", x=x, y=random.integers(62, size=n), client=np.arange(n) % 40)
    return {
        "ArrayData": ["--data.path", str(folder / "data.npz")],
        "cache": ["--data.cache_dir", str(folder / "cache")],
    }


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_runs(path, inputs, tmp_path):
    """One chunk of training and one of validation, then one of each test population."""
    piece = yaml.safe_load((path.parent / yaml.safe_load(path.read_text())["data"]).read_text())
    options = [*inputs["cache"], *inputs.get(piece["class_path"], [])]
    options += ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    options += ["--trainer.default_root_dir", str(tmp_path), "--data.chunk_size", "2"]
    cli = run(["fit", "--config", str(path), *options])
    assert cli.trainer.global_step == 1
    metrics = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    assert any("test/new/personalized_accuracy" in figures for figures in metrics)


@pytest.mark.parametrize("path", PIECES, ids=name)
def test_every_key_has_a_comment(path):
    """On its own line; `class_path` and the groups above it are said by the comment at the top."""
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# "), "the first line says what the file is"
    silent = ("class_path:", "init_args:", "data: shared/", "model:", "backbone: shared/", "loop: shared/", "method:")
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if key and not key.startswith("#") and not key.startswith((*silent, "trainer:")):
            assert "  # " in line, f"{name(path)}:{number} has no comment: {key}"
