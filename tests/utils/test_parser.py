"""The command line's manners: one line for a mistake, with the nearest name; help on a page; values as agents write."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flow_pl import models
from flow_pl.__main__ import COMMANDS, main
from flow_pl.cli import run
from flow_pl.errors import ConfigurationError
from flow_pl.serving import load
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
    "a method": (["--model.method", "Flw"], ["model.method is Flw", "Did you mean Flow?"]),
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
    "another case": (["--model.method", "FLOW"], ["model.method is FLOW", "Did you mean Flow?"]),
    "no section": (["--batch_size", "3"], ["no option --batch_size. Did you mean --model.loop.batch_size?"]),
    "no section, and a typo": (["--cohort_sise=3"], ["Did you mean --data.cohort_size?"]),
    "nothing": (["--trainer.max_epochs="], ["trainer.max_epochs is empty, expected a whole number or null."]),
    "nothing for the loop": (["--model.loop.local_epochs", ""], ["model.loop.local_epochs is empty, expected a whole"]),
    "nothing to choose": (["--model.method.split="], ["model.method.split is empty, expected parts, none or cross."]),
    "nothing as a class": (["--model.method="], ["model.method is empty, which names no class. Known are APFL"]),
    "a class of a module that is not there": (
        ["--model.backbone", "my_absent.SmallCNN"],
        ["model.backbone is my_absent.SmallCNN, but no module my_absent is found: start with `python -m flow_pl`"],
    ),
    "no value": (["--model.loop.local_epochs"], ["--model.loop.local_epochs needs a value."]),
    "no value of the data": (["--data.cohort_size", "--trainer.max_epochs=1"], ["--data.cohort_size needs a value."]),
    "help of what there is not": (["--model.method.help", "Flw"], ["model.method is Flw", "Did you mean Flow?"]),
    "another help": (["--help", "al"], ["--help is al, expected nothing or all."]),
    "a class within braces": (["--data", '{"class_path": "SyntheticDta"}'], ["Did you mean SyntheticData?"]),
    "a setting of what there is not": (
        ["--data.partitioner.init_args.alpha=0.3"],
        ["data (SyntheticData) has no setting partitioner."],
    ),
    "a setting of a mistyped one": (["--model.method.roter.hidden=[3]"], ["(Flow) has no setting roter.", "router?"]),
    "a setting of a number": (["--trainer.max_epochs.x=1"], ["trainer.max_epochs has no settings of its own"]),
    "init_arg": (
        ["--model.method", '{"class_path": "Flow", "init_arg": {}}'],
        ["model.method has settings other than class_path and init_args"],
    ),
}


ALIKE = ("another case", "no section, and a typo", "nothing for the loop", "nothing to choose", "no value of the data",
         "a number", "a seed", "a callback", "data", "a class within braces", "a router", "an optimizer", "one dash",
         "nothing as a class", "nothing", "no section", "a setting of the loop", "a learning rate")  # fmt: skip
"""Mistakes of the kind of another one."""


@pytest.mark.parametrize(
    "mistake", [pytest.param(each, marks=pytest.mark.slow) if each in ALIKE else each for each in MISTAKES]
)
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
        ["model.backbone is mine.Net", "no module mine is found"],
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


@pytest.mark.parametrize(
    "place",
    ["data: {{partitioner: {}}}", "data: {{init_args: {{partitioner: {}}}}}", "--data.partitioner={}"],
)
def test_a_class_in_a_mapping_is_named_by_its_full_path(tmp_path, monkeypatch, capsys, place):
    """Where the message once listed data modules."""
    monkeypatch.chdir(tmp_path)
    given = place.format("{class_path: NaturalIdPartitioner, init_args: {partition_by: user}}")
    if not given.startswith("--"):
        Path("mine.yaml").write_text(given)
        given = "-c=mine.yaml"
    code, said = fails(capsys, "fit", "-c", "task/cifar10", "-c", "method/fedavg", given)
    path = "flwr_datasets.partitioner.NaturalIdPartitioner"
    assert code == 2
    assert said == f"error: data.partitioner is NaturalIdPartitioner, expected the full path of a class: {path}.\n"


def test_the_class_in_a_mapping_is_not_set_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    option = "--data.partitioner.class_path=flwr_datasets.partitioner.IidPartitioner"
    code, said = fails(capsys, "fit", "-c", "task/cifar10", "-c", "method/fedavg", option)
    assert code == 2
    assert said.startswith("error: data.partitioner.class_path cannot be set alone: set all of it, as in --data.part")
    whole = "--data.partitioner={class_path: flwr_datasets.partitioner.IidPartitioner, init_args: {num_partitions: 5}}"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "task/cifar10", "-c", "method/fedavg", whole, "--print_config"])
    assert stop.value.code == 0


OTHERS = {
    "no option at all": (["compare"], 2, "flow-pl compare needs --methods. `flow-pl compare --help` lists"),
    "what must be given": (["compare", "--methds", "a"], 2, "no option --methds. Did you mean --methods?"),
    "an option": (["compare", "--methods", "method/flow", "--sedes", "1"], 1, "--sedes. Did you mean --seeds?"),
    "an option of the runs": (["compare", "--methods", "method/flow", "--trainer.device=1"], 1, "--trainer.devices?"),
    "a number": (["compare", "--methods", "method/flow", "--seeds", "a"], 2, "--seeds is a, expected a whole number."),
    "no number": (["compare", "--methods", "method/flow", "--jobs"], 2, "--jobs needs a value."),
    "a choice": (
        ["compare", "--methods", "a", "--checkpoint", "lst"],
        2,
        "--checkpoint is lst, expected last or best.",
    ),
    "a method": (["compare", "--methods", "method/flwo"], 1, "Did you mean method/flow?"),
    "a command": (["configs", "copi", "task/digits"], 2, "there is no flow-pl configs copi. Did you mean copy?"),
    "a folder": (["configs", "copy", "task/digits", "file/folder"], 2, "folder cannot be created"),
    "a format": (["export", "-c", "a", "--ckpt_path=b", "--out=c", "--fromat=onnx"], 1, "Did you mean --format?"),
    "a checkpoint": (["personalize", "-c", "a", "--ckpt=b", "--data=d", "--out=c"], 2, "Did you mean --ckpt_path?"),
}


@pytest.mark.parametrize("mistake", OTHERS)
def test_a_mistake_in_another_command_gets_one_line_as_well(tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    words, status, expected = OTHERS[mistake]
    code, said = fails(capsys, *words)
    assert (code, said.count("\n")) == (status, 1)
    assert said.startswith("error: ")
    assert expected in said


@pytest.mark.parametrize("option", ["-c", "--config="])
def test_a_file_that_is_no_yaml_is_named(tmp_path, capsys, option):
    broken = tmp_path / "broken.yaml"
    broken.write_text("trainer: {max_epochs: 3\nmodel: [")
    words = [f"{option}{broken}"] if option.endswith("=") else [option, str(broken)]
    code, said = fails(capsys, "fit", "-c", "task/digits", *words)
    assert (code, said.count("\n")) == (2, 1)
    assert f"error: {broken} is not valid YAML: " in said
    assert "line 1" in said


def test_help_of_a_command_fits_on_a_page(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert page.count("\n") <= 60
    assert max(map(len, page.splitlines())) <= 100
    for words in ("max_epochs", "Ditto", "ArrayData", "server_optimizer", "--ckpt_path", "--help all"):
        assert words in page
    backbones = page.partition("  backbone  ")[2].partition("  method  ")[0].replace(",", " ").split()
    # whoever adds a class says whether it is a whole model or a layer
    assert {*backbones, "Dropout", "LSTM", "Recurrent"} == set(models.__all__)
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


@pytest.mark.slow
def test_home_in_the_other_commands(config, tmp_path, monkeypatch, capsys):  # noqa: F811
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    run(["fit", "--config", str(config), "--trainer.max_epochs=1", "--trainer.default_root_dir=~/run"])
    (home / "run" / "copy.yaml").write_text(config.read_text())
    model = ["-c", "~/run/copy.yaml", "--ckpt_path", "~/run/checkpoints/last.ckpt"]
    main(["export", *model, "--format=safetensors", "--out=~/models/m.safetensors"])
    main(["configs", "copy", "task/digits", "~/mine"])
    load(None, "~/run/checkpoints/last.ckpt")  # from Python, too
    assert (home / "models" / "m.safetensors").exists()
    assert (home / "mine" / "digits.yaml").exists()
    assert not list(Path().glob("~*"))


def test_only_a_leading_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    assert expand_home({"a": ["~/x", "b~", {"c": "~"}], "n": 1}) == {"a": ["/home/a/x", "b~", {"c": "/home/a"}], "n": 1}
