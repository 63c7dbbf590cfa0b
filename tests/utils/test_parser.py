"""The command line's manners: one line for a mistake, with the nearest name; help on a page; values as agents write."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flow_pl.__main__ import COMMANDS, main
from flow_pl.cli import run
from flow_pl.errors import ConfigurationError
from flow_pl.utils.parser import expand_home
from flow_pl.utils.words import check_options, nulls
from tests.test_cli import config, fails  # noqa: F401 (a fixture)

MISTAKES = {
    "an option of the trainer": (["--trainer.max_epoch", "3"], ["--trainer.max_epoch", "--trainer.max_epochs"]),
    "an option of the command": (["--ckpt_pth", "x"], ["--ckpt_pth", "--ckpt_path", "flow-pl fit --help"]),
    "an option of the model": (["--model.methd", "Flow"], ["--model.methd", "--model.method"]),
    "a setting of the data": (["--data.cohort_sise", "3"], ["cohort_sise", "cohort_size", "--data.help SyntheticData"]),
    "a setting of the method": (["--model.method.splitt", "none"], ["splitt", "Did you mean split?", "help Flow"]),
    "a setting of the loop": (["--model.loop.batch_sise", "3"], ["batch_sise", "Did you mean batch_size?"]),
    "a setting of an optimizer": (
        ["--model.loop.client_optimizer", "torch.optim.SGD", "--model.loop.client_optimizer.lrr", "1"],
        ["model.loop.client_optimizer (SGD)", "lrr", "Did you mean lr?"],
    ),
    "a setting of a callback": (
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.moniter", "x"],
        ["moniter", "Did you mean monitor?", "--trainer.callbacks.help EarlyStopping"],
    ),
    "a method": (["--model.method", "Flw"], ["model.method is Flw", "Did you mean Flow?", "Ditto"]),
    "a router": (["--model.method.router", "InstanceRoutr"], ["model.method.router", "Did you mean InstanceRouter?"]),
    "data": (["--data", "SyntheticDta"], ["data is SyntheticDta", "Did you mean SyntheticData?"]),
    "an optimizer": (["--model.loop.client_optimizer", "torch.optim.Adm"], ["Did you mean Adam?"]),
    "a callback": (["--trainer.callbacks", "EarlyStoping"], ["Did you mean EarlyStopping?"]),
    "a choice": (["--model.method.split", "thirds"], ["model.method.split is thirds, expected parts, none or cross."]),
    "a number": (["--trainer.max_epochs", "two"], ["trainer.max_epochs is two, expected a whole number or null."]),
    "a learning rate": (
        ["--model.loop.client_optimizer", "torch.optim.SGD", "--model.loop.client_optimizer.lr", "fast"],
        ["model.loop.client_optimizer.lr is fast, expected a number or null."],
    ),
    "a switch": (
        ["--trainer.enable_progress_bar", "maybe"],
        ["trainer.enable_progress_bar is maybe, expected true or false or null."],
    ),
    "a seed": (["--seed_everything", "x"], ["seed_everything is x, expected true or false or a whole number."]),
    "an argument that has no default": (
        ["--trainer.callbacks+=EarlyStopping"],
        ["trainer.callbacks (EarlyStopping) needs monitor: set trainer.callbacks.monitor."],
    ),
    "one dash": (["-trainer.max_epochs", "3"], ["no option -trainer.max_epochs", "Did you mean --trainer.max_epochs?"]),
    "a word too many": (["more"], ["there is no option more"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_with_the_nearest_name(config, capsys, mistake):  # noqa: F811
    options, expected = MISTAKES[mistake]
    code, said = fails(capsys, "fit", "--config", config, *options)
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    for words in expected:
        assert words in said
    assert len(said) < 500


YAML_MISTAKES = {
    "a section": ("trianer", {"max_epochs": 1}, ["there is no setting trianer", "Did you mean trainer?"]),
    "a setting of the trainer": ("trainer.max_epoch", 3, ["trainer has no setting max_epoch", "max_epochs?"]),
    "a setting of the model": ("model.metod", {"class_path": "Flow"}, ["model has no setting metod", "method?"]),
    "a nested setting": ("model.method.init_args.router.init_args.hiden", [4], ["hiden", "Did you mean hidden?"]),
    "no class path": ("data", {"cohort_size": 3}, ["data has settings but no class_path"]),
    "no module": (
        "model.backbone.class_path",
        "mine.Net",
        ["model.backbone is mine.Net", "No module"],
    ),
    "another kind": (
        "model.method.class_path",
        "flow_pl.models.MLP",
        ["not correspond to a subclass"],
    ),
    "None": ("data.init_args.deadline", "None", ["data.deadline is None, expected a whole number or null (null is"]),
    "nothing needed": ("trainer.callbacks", [{"class_path": "EarlyStopping"}], ["(EarlyStopping) needs monitor"]),
}


@pytest.mark.parametrize("mistake", YAML_MISTAKES)
def test_a_mistake_in_a_file_gets_one_line_as_well(config, capsys, mistake):  # noqa: F811
    path, value, expected = YAML_MISTAKES[mistake]
    settings = yaml.safe_load(config.read_text())
    *outer, last = path.split(".")
    node = settings
    for name in outer:
        node = node[name]
    node[last] = value
    config.write_text(yaml.safe_dump(settings))
    code, said = fails(capsys, "fit", "--config", config)
    assert (code, said.count("\n")) == (2, 1)
    for words in expected:
        assert words in said


def test_help_of_a_command_fits_on_a_page(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert page.count("\n") <= 60
    assert max(map(len, page.splitlines())) <= 100
    for words in ("max_epochs", "Ditto", "ArrayData", "server_optimizer", "--ckpt_path", "--help all"):
        assert words in page
    with pytest.raises(SystemExit):
        main(["fit", "--help", "all"])
    assert "--model.max_rejected MAX_REJECTED" in capsys.readouterr().out


def test_help_and_mistyped_names_need_neither_torch_nor_lightning():
    """A fresh interpreter that cannot import them."""
    code = (
        "import sys; sys.modules.update(torch=None, lightning=None, numpy=None)\n"
        "from flow_pl.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: print('status', stop.code)\n"
    )
    for words, said, status in [
        (["--help"], "compare", 0),
        (["--version"], "flow-pl 0", 0),
        (["fti"], "there is no command fti. Did you mean fit?", 2),
        (["fit", "-c", "task/digts"], "Did you mean task/digits?", 2),
    ]:
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert said in done.stdout + done.stderr
        assert f"status {status}" in done.stdout


def test_every_command_is_in_the_overview(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in COMMANDS)


def test_python_values_become_those_of_yaml():
    words = ["fit", "--a=None", "--b", "None", "--c=[1, None, {'k': None}]", "None", "--d=None of them", "--e=none"]
    assert nulls(words) == [
        *("fit", "--a=null", "--b", "null", '--c=[1, null, {"k": null}]', "None", "--d=None of them", "--e=none")
    ]


@pytest.mark.parametrize("option", [["--data.deadline=None"], ["--data.deadline", "None"]])
def test_an_agent_may_write_none(config, option):  # noqa: F811
    trial = ["--trainer.fast_dev_run=True", "--trainer.enable_progress_bar=False"]
    cli = run(["fit", "--config", str(config), "--data.deadline=30", *option, *trial])
    assert cli.datamodule.availability.all_arrive


def test_options_are_checked_against_the_sources():
    check_options(
        ["predict", "--return_predictions=1", "--trainer.callbacks+=A", "--trainer.callbacks.x=3", "--data.q=1"]
    )
    check_options(["fit", "--model.method.help", "Flow", "--print_config=skip_default", "-c", "x", "--trainer.help"])
    with pytest.raises(ConfigurationError, match="no option --verbose"):
        check_options(["fit", "--verbose=1"])
    with pytest.raises(ConfigurationError, match=r"no option --trainer.device\. Did you mean --trainer.devices"):
        check_options(["test", "--trainer.device=1"])


def test_home_is_put_in_place_of_a_tilde_everywhere(config, tmp_path, monkeypatch):  # noqa: F811
    """Run, cache, checkpoint and callback: all below the home folder, none in a folder called ~."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    options = ["--trainer.default_root_dir=~/run", "--data.cache_dir=~/cache", "--trainer.max_epochs=1"]
    options += ["--trainer.callbacks+=ResultsTable", "--trainer.callbacks.path=~/t/test.json"]
    run(["fit", "--config", str(config), *options])
    run(["test", "--config", str(config), *options, "--ckpt_path=~/run/checkpoints/last.ckpt"])
    assert (home / "run" / "checkpoints" / "last.ckpt").exists()
    assert (home / "t" / "test.json").exists()
    assert any((home / "cache").iterdir())
    assert not list(Path().glob("~*"))


def test_only_a_leading_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    assert expand_home({"a": ["~/x", "b~", {"c": "~"}], "n": 1}) == {"a": ["/home/a/x", "b~", {"c": "/home/a"}], "n": 1}
