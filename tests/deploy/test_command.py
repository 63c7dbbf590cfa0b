"""The command `flow-pl deploy`: the app that it writes, and what it refuses."""

import pytest

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

from flow_pl.deploy.command import app_name, deploy
from flow_pl.deploy.server_app import RUN_CONFIG
from flow_pl.errors import ConfigurationError


def test_an_app_replaces_no_files(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ConfigurationError, match="already exists and is not empty"):
        deploy(["-c", "task/digits", "-c", "method/fedavg", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_flwr_run_may_change_is_in_the_app(start):
    app = start("fedavg").config.parents[1]
    flwr = pytest.importorskip("tomllib").loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert flwr["config"] == {**RUN_CONFIG, "folder": flwr["config"]["folder"]}
    assert (app / "LICENSE").read_text().startswith("All rights reserved by local.")


def test_the_licence_of_an_app_is_its_publishers_choice(start, tmp_path):
    licence = tmp_path / "MIT.txt"
    licence.write_text("MIT License\n")
    app = start("fedavg", f"--license={licence}").config.parents[1]
    assert (app / "LICENSE").read_text() == "MIT License\n"
    with pytest.raises(ConfigurationError, match=r"the licence .*absent cannot be read .*give --license a text file"):
        start("fedavg", f"--license={tmp_path / 'absent'}")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("--data.init_args.dropout=0.5", "data.dropout or data.deadline"),
        ("--model.compression=TopK", "model.compression is TopK"),
        ("--trainer.precision=bf16-mixed", "trainer.precision is bf16-mixed"),
        ("--model.objective=Regression", "model.objective is Regression, which cannot be deployed"),
    ],
)
def test_what_is_simulated_is_not_deployed(setting, said, start):
    with pytest.raises(ConfigurationError, match=said):
        start("fedavg", setting)


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("runs/digits/flow", "digits-flow"),
        ("runs/shakespeare_roles/interpolation_votes", "shakespeare-roles-interpolation"),
        ("runs/my exp", "runs-my-exp"),
        ("/2024", "run-2024"),
        (".", "run"),
    ],
)
def test_an_app_has_a_name_that_flower_takes(root, name):
    """A letter first, then letters, digits and hyphens, 32 at most."""
    assert app_name(root) == name


@pytest.mark.parametrize("name", ["my_app", "2nd", "a" * 33])
def test_a_folder_that_flower_refuses_is_refused(tmp_path, name):
    with pytest.raises(ConfigurationError, match=f"the folder's name is '{name}'.*choose another one with --out"):
        deploy(["-c", "task/digits", "-c", "method/fedavg", "--out", str(tmp_path / name)])
    assert not (tmp_path / name).exists()


def test_any_publisher_is_written_as_toml(start):
    app = start("fedavg", '--publisher=O"Neil \\ 😀').config.parents[1]
    flwr = pytest.importorskip("tomllib").loads((app / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]
    assert flwr["app"]["publisher"] == 'O"Neil \\ 😀'
