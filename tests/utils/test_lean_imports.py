"""What a short process need not import is not imported, and can be imported later."""

import subprocess
import sys
from pathlib import Path

import pytest

from flow_pl.utils.lean_imports import UNUSED, names_foreign_code

ROOT = Path(__file__).resolve().parents[2]

PROCESS = f"""
import gc, importlib.metadata, sys
from flow_pl.utils.lean_imports import lean_imports
with lean_imports():
    import flow_pl.module
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count()
assert "torchmetrics" in sys.modules
found = [name for name in {UNUSED} if name in sys.modules]
assert not found, found
assert importlib.metadata.version("scipy")
import scipy.signal
"""


@pytest.mark.slow
def test_imports_leave_out_what_is_not_used_and_it_can_be_imported_later():
    pytest.importorskip("scipy")
    done = subprocess.run([sys.executable, "-c", PROCESS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("class_path: flow_pl.data.Digits\nlr: 0.5  # see my_module.Net", False),
        ("optimizer: torch.optim.SGD", False),
        ("/home/me/data.npz", False),
        ("runs/digits.v2/last.ckpt", False),
        ("class_path: my_metrics.Plots", True),
        ("{class_path: torchmetrics.text.BERTScore}", True),
        ("my_flow_pl.data.Mine", True),
    ],
)
def test_code_of_others_is_noticed(text, foreign):
    assert names_foreign_code([text]) == foreign


def test_shipped_configurations_run_known_code():
    folders = ("method", "tuned", "ablation", "federation", "model", "server")
    paths = (path for each in folders for path in (ROOT / "configs" / each).rglob("*.yaml"))
    assert not names_foreign_code(path.read_text() for path in paths)
