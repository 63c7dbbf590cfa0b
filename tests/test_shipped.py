"""Shipped configurations are found by name from anywhere, listed and copied; a run's folder follows from the names."""

import subprocess
import sys
from pathlib import Path

import pytest

from flow_pl import shipped
from flow_pl.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_file_of_the_folder_comes_before_a_shipped_one():
    assert shipped.find("task/digits") == shipped.find("task/digits.yaml") == shipped.FOLDER / "task" / "digits.yaml"
    Path("task").mkdir()
    Path("task/digits.yaml").write_text("# mine\n")
    assert shipped.find("task/digits.yaml") == Path("task/digits.yaml")


def test_a_name_that_is_not_there_gets_the_nearest():
    with pytest.raises(ConfigurationError, match=r"no configuration task/digit, .* Did you mean task/digits\?"):
        shipped.find("task/digit")
    with pytest.raises(ConfigurationError, match=r"nothing/like/it.* `flow-pl configs` lists those"):
        shipped.match("nothing/like/it/*.yaml")


def test_patterns_are_of_the_folder_or_else_of_the_shipped_files():
    assert [path.stem for path in shipped.match("tuned/shakespeare_roles/flow*.yaml")] == ["flow", "flow_evidence"]
    assert shipped.match("tuned/digits/*") == shipped.match("tuned/digits/*.yaml")
    Path("method").mkdir()
    Path("method/mine.yaml").write_text("# mine\n")
    assert shipped.match("method/*.yaml") == [Path("method/mine.yaml")]


def test_patterns_may_begin_at_the_root_or_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "best" / "old").mkdir(parents=True)
    files = [tmp_path / "best" / name for name in ("b.yaml", "a.yaml", "old/c.yaml")]
    for path in files:
        path.write_text("# mine\n")
    assert shipped.match(f"{tmp_path}/best/*.yaml") == [files[1], files[0]]
    assert shipped.match("~/best/[ab].yaml") == [files[1], files[0]]
    assert shipped.match(f"{tmp_path}/best/**/*.yaml") == [files[1], files[0], files[2]]
    with pytest.raises(ConfigurationError, match=f"{tmp_path}/best/none.* matches no file"):
        shipped.match(f"{tmp_path}/best/none*")


@pytest.mark.parametrize("option", ["-c", "--config"])
def test_names_on_the_command_line_become_files(option):
    digits, ditto = (str(shipped.find(name)) for name in ("task/digits", "method/ditto"))
    args, files = shipped.expand(["fit", option, "task/digits", f"{option}=method/ditto", "--data.path", "x"])
    assert args == ["fit", option, digits, f"{option}={ditto}", "--data.path", "x"]
    assert files == [digits, ditto]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["task/digits", "method/ditto"], "digits/ditto"),
        (["task/emnist", "tuned/emnist/flow", "ablation/routing_hard"], "emnist/flow-routing_hard"),
        (["task/digits", "method/flow", "logger/wandb"], "digits/flow"),
        (["task/cifar10", "federation/dirichlet_0.1", "method/flow"], "cifar10-dirichlet_0.1/flow"),
        (["task/array", "model/vit", "method/flow"], "array-vit/flow"),
        (["task/array", "server/averaged", "method/flow"], "array-averaged/flow"),
        (["mine.yaml"], "mine"),
        ([], ""),
    ],
)
def test_the_name_of_a_run(names, expected):
    Path("mine.yaml").write_text("# mine\n")
    assert shipped.run_name(map(shipped.find, names)) == expected


def test_the_list_has_a_line_for_each(capsys):
    assert shipped.command([]) == 0
    shown = capsys.readouterr().out
    for name in shipped.names():
        assert f"  {name} " in shown
    assert all(len(line) <= 160 for line in shown.splitlines())


def test_a_copy_can_be_changed_and_replaces_nothing(capsys):
    shipped.command(["copy", "task/digits", "mine"])
    assert capsys.readouterr().out == "mine/digits.yaml\n"
    assert Path("mine/digits.yaml").read_text() == shipped.find("task/digits").read_text()
    with pytest.raises(ConfigurationError, match=r"mine/digits\.yaml already exists"):
        shipped.command(["copy", "task/digits", "mine"])


def test_callbacks_of_a_user_do_not_get_in_the_way():
    """A package `callbacks` beside their work is theirs."""
    Path("callbacks").mkdir()
    Path("callbacks/__init__.py").write_text("raise RuntimeError('not yours')\n")
    done = subprocess.run([sys.executable, "-m", "flow_pl", "configs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "task/digits" in done.stdout
