"""Every task runs with every method, and each shipped file says what its keys mean."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from flow_pl import shipped
from flow_pl.cli import run
from flow_pl.compare.settings import resolve
from tests.data.published_formats import emnist, posts, reddit, write_leaf, write_tff
from tools.configs_page import tasks

ROOT = Path(__file__).resolve().parents[1]
NAMES = shipped.names()
TASKS, METHODS, TUNED, ABLATIONS = (
    [name.partition("/")[2] for name in NAMES if name.startswith(f"{kind}/")]
    for kind in ("task", "method", "tuned", "ablation")
)
PAIRS = [(task, f"method/{method}") for task in TASKS if task != "digits" for method in METHODS]
PAIRS += [(task, f"tuned/{name}") for name in TUNED for task in tasks(f"tuned/{name}")]
GATED = {pair for number, pair in enumerate(PAIRS) if number % (3 if pair[1].startswith("tuned/") else 11) == 0}
"""Pairs that run at every change: each method and each task are in some of them, and the digits are with each method.
The others are `extended`."""
TEXTS = ["to be or not", "that is the question", "whether it is nobler"]


def arrays(folder, settings):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, size=(40, 28, 28), dtype=np.uint8)
    classes = np.arange(40) % 10
    np.savez(folder / "data.npz", x=x, y=classes, client=np.arange(40) % 8)
    return ["--data.path", str(folder / "data.npz")]


def emnist_files(folder, settings):
    for part in ("train", "test"):
        write_tff(folder / f"fed_emnist_{part}.h5", {f"f000{client}_14": emnist(client, 1, 2) for client in range(4)})
    return ["--data.folder", str(folder)]


def shakespeare_files(folder, settings):
    for part in ("train", "test"):
        plays = {f"THE_PLAY_ROLE_{role}": {"snippets": TEXTS} for role in range(4)}
        write_tff(folder / f"shakespeare_{part}.h5", plays)
    return ["--data.folder", str(folder)]


def stack_overflow_files(folder, settings):
    for part, users in (("train", "1234"), ("test", "12"), ("held_out", "56")):
        write_tff(folder / f"stackoverflow_{part}.h5", {user: posts(*TEXTS) for user in users})
    return ["--data.folder", str(folder)]


def leaf_files(folder, settings):
    encoding = settings["encoding"]
    users = "1234"
    if encoding["class_path"] == "TokenSequences":
        user_data = {user: reddit(*TEXTS, length=encoding["init_args"]["length"]) for user in users}
    else:
        user_data = {user: {encoding["init_args"]["text"]: TEXTS} for user in users}
    options = []
    for part in ("train", "validation", "test"):
        if part in settings:
            options += [f"--data.{part}", write_leaf(folder / f"{part}.json", user_data)]
    return options


def hub_table(folder, settings):
    """As the hub's own Parquet files: encoded pictures and labels with names, here in one local file; or as `.npz`."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    columns = settings["encoding"]["init_args"]
    shape = (columns["height"], columns["width"], columns["channels"])
    random = np.random.default_rng(0)
    labels = np.arange(24) % 2
    partitioner = settings["partitioner"]
    fewer = {**partitioner["init_args"], "num_partitions": 4, "min_partition_size": 3}
    options = ["--data.partitioner", json.dumps({**partitioner, "init_args": fewer})]
    if settings["path"].endswith(".npz"):
        rows = {"train": labels[:16], "test": labels[16:]}
        arrays = {f"{columns['label']}_{part}": values for part, values in rows.items()}
        for part, values in rows.items():
            size = (len(values), *shape)
            arrays[f"{columns['image']}_{part}"] = random.integers(256, size=size, dtype=np.uint8)
        np.savez(folder / "table.npz", **arrays)
        return ["--data.path", str(folder / "table.npz"), *options]
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pictures = [image.fromarray(random.integers(0, 256, size=shape, dtype=np.uint8)) for _ in labels]
    classes = datasets.ClassLabel(num_classes=columns["num_classes"])
    features = datasets.Features({columns["image"]: datasets.Image(), columns["label"]: classes})
    table = {columns["image"]: pictures, columns["label"]: labels.tolist()}
    datasets.Dataset.from_dict(table, features=features).to_parquet(folder / "table.parquet")
    return ["--data.path", str(folder / "table.parquet"), *options]


INPUTS = {
    "ArrayData": arrays,
    "EmnistData": emnist_files,
    "LeafData": leaf_files,
    "PartitionedData": hub_table,
    "ShakespeareData": shakespeare_files,
    "StackOverflowData": stack_overflow_files,
    "StackOverflowTagsData": stack_overflow_files,
}
"""By data module, where it reads files: writes tiny ones of the published form and returns the options naming them."""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Runs are named for their files, and written below the folder they are started from."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def tiny(task, folder, cache):
    """Options that make one chunk of two clients of a task, on files of the published form."""
    data = yaml.safe_load(shipped.find(f"task/{task}").read_text())["data"]
    settings = data["init_args"]
    options = ["--data.cache_dir", str(cache), "--data.chunk_size", str(min(2, settings["chunk_size"]))]
    if data["class_path"] in INPUTS:
        options += INPUTS[data["class_path"]](folder, settings)
        options += ["--data.cohort_size", "2", "--data.val_clients", "2", "--data.min_examples", "1"]
        options += ["--data.new_client_fraction", "0.5"]
        options += ["--data.length", "5"] if "length" in settings else []
        options += ["--data.client_fraction", "1"] if "client_fraction" in settings else []
    options += ["--model.loop.local_epochs", "1", "--model.loop.personal_epochs", "1"]
    return [*options, "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]


UNSERVED_TAGS = {
    f"method/{name}"
    for name in ("fedala", "fedbabu", "fedcp", "feddbe", "fedper", "fedrep", "fedrod", "flow_evidence",
                 "interpolation_votes", "knn_per", "lg_fedavg", "lp_ft")
}  # fmt: skip
"""Logistic regression has no body and head, and neighbours vote for a single label: each is refused, and tested so."""


def served(task, method):
    """Whether a task has what a method needs."""
    return not (task == "stackoverflow_tags" and method in UNSERVED_TAGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method"),
    [pytest.param(*pair, marks=[] if pair in GATED else pytest.mark.extended) for pair in PAIRS if served(*pair)],
)
def test_every_task_runs_with_every_method(task, method, cache, tmp_path):
    """One chunk of training and one of validation, then one of each test population."""
    cli = run(["fit", "-c", f"task/{task}", "-c", method, *tiny(task, tmp_path, cache)])
    assert cli.trainer.global_step == 1
    metrics = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    assert any("test/new/personalized_accuracy" in figures for figures in metrics)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(f"method/{name}", marks=[] if number % 3 == 0 else pytest.mark.slow)
        for number, name in enumerate(METHODS)
    ],
)
def test_every_method_runs_on_the_digits(method, cache, tmp_path):
    cli = run(["fit", "-c", "task/digits", "-c", method, *tiny("digits", tmp_path, cache)])
    assert cli.trainer.global_step == 1
    assert cli.trainer.default_root_dir == str(Path("runs", "digits", Path(method).name))


@pytest.mark.slow
@pytest.mark.parametrize("third", [0, *(pytest.param(third, marks=pytest.mark.extended) for third in (1, 2))])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_parses_with_every_method(task, third):
    """A third of the methods in the gate, other ones for each task."""
    for method in (f"method/{name}" for name in METHODS[(third + TASKS.index(task)) % 3 :: 3]):
        settings = resolve([shipped.find(f"task/{task}"), shipped.find(method)], [])
        assert settings["model"]["method"]["class_path"].startswith("flow_pl.methods.")


@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_a_comment(name):
    """On its own line; `class_path` and the groups above it are said by the comment at the top."""
    lines = shipped.find(name).read_text().splitlines()
    assert lines[0].startswith("# "), "the first line says what the file is"
    groups = re.compile(r"(init_args|model|method|data|trainer|loop|client_optimizer|class_path):")
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if key and not key.startswith("#") and not groups.match(key):
            assert "  # " in line, f"{name}:{number} has no comment: {key}"


@pytest.mark.parametrize(
    ("name", "task"),
    [
        pytest.param(name, task, marks=pytest.mark.slow if number + place else [])
        for number, name in enumerate(name for name in NAMES if name.startswith("federation/"))
        for place, task in enumerate(("cifar10", "cifar100", "cifar10_npz"))
    ],
)
def test_a_division_changes_who_the_clients_are_and_nothing_else(name, task):
    """Twenty clients, all in each round."""
    alpha = float(name.rpartition("_")[2])
    files = [shipped.find(file) for file in (f"task/{task}", name, "method/fedavg")]
    whole, changed = resolve([files[0], files[2]], []), resolve(files, [])
    data = changed["data"]["init_args"]
    assert (data["cohort_size"], data["val_clients"], data["new_client_fraction"]) == (20, 20, 0)
    partitioner, given = (each["data"]["init_args"].pop("partitioner") for each in (changed, whole))
    assert partitioner["init_args"] == {
        **given["init_args"],
        "num_partitions": 20,
        "alpha": alpha,
        "partition_by": None,
    }
    for each in (whole, changed):
        del each["trainer"]["default_root_dir"]
        for setting in ("cohort_size", "val_clients", "new_client_fraction"):
            del each["data"]["init_args"][setting]
    assert changed == whole


def test_an_averaged_server_keeps_the_callbacks_of_other_files(tmp_path):
    """It changes the server, and nothing else."""
    other = tmp_path / "report.yaml"
    other.write_text("trainer:\n  callbacks+:\n  - class_path: RoutingReport\n")
    files = [shipped.find(file) for file in ("task/digits", "server/averaged", "method/flow")]
    whole, changed = resolve([files[0], files[2]], []), resolve([*files, other], [])
    average, report = changed["trainer"].pop("callbacks")
    assert (average["class_path"], average["init_args"]["decay"]) == (
        "lightning.pytorch.callbacks.EMAWeightAveraging",
        0.8,
    )
    assert report["class_path"] == "flow_pl.callbacks.RoutingReport"
    assert changed["model"].pop("server_optimizer")["init_args"]["momentum"] == 0.8
    del whole["trainer"]["callbacks"], whole["model"]["server_optimizer"]
    for each in (whole, changed):
        del each["trainer"]["default_root_dir"]
    assert changed == whole


@pytest.fixture(scope="module")
def plain_flow():
    """Flow's settings on the digits, resolved once."""
    return resolve([shipped.find(name) for name in ("task/digits", "method/flow")], [])


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_changes_one_setting_of_flow(ablation, plain_flow):
    files = [shipped.find(name) for name in ("task/digits", "method/flow", f"ablation/{ablation}")]
    whole, changed = copy.deepcopy(plain_flow), resolve(files, [])
    options, other = (each["model"]["method"].pop("init_args") for each in (whole, changed))
    del whole["trainer"]["default_root_dir"], changed["trainer"]["default_root_dir"]
    assert whole == changed
    ((key, value),) = yaml.safe_load(files[2].read_text())["model"]["method"]["init_args"].items()
    assert other == {**options, key: value}


def test_tuned_methods_are_for_a_task_there_is():
    for name in TUNED:
        served = tasks(f"tuned/{name}")
        assert name.partition("/")[0] in served
        assert set(served) <= set(TASKS)
    assert {name.partition("/")[2] for name in TUNED} <= set(METHODS)


def test_configurations_stay_small():
    """A method is ten lines at most: what stands in every file would be a design error."""
    lines = {name: len(shipped.find(name).read_text().splitlines()) for name in NAMES}
    assert all(count <= 10 for name, count in lines.items() if name.startswith(("method/", "ablation/")))
