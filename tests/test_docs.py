"""The documentation says what the code does: its code runs, its commands parse, its names are those of the code."""

import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import flow_pl.methods
from flow_pl import callbacks
from flow_pl.__main__ import STAGES, main
from flow_pl.cli import run
from flow_pl.compare import tune_command
from flow_pl.compare.tuning import read_values
from flow_pl.methods import Method

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
METHODS = {
    Path(inspect.getfile(cls)).stem: cls
    for cls in vars(flow_pl.methods).values()
    if inspect.isclass(cls) and issubclass(cls, Method) and cls is not Method
}
COMMAND = re.compile(r"^    (?:flow-pl|python -m flow_pl) (.*)$", re.MULTILINE)
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
YAML = re.compile(r"^```yaml\n# (\w+\.yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu"]
DIGITS = ["-c", "task/digits", "-c", "tuned/digits/flow"]


def name(path):
    return str(path.relative_to(DOCS))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, where Python finds modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOW_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - before:
        if (tmp_path / f"{module}.py").exists():
            del sys.modules[module]


def run_page(page):
    """In the order of the page: code with a file's name in its first line is written there, other code and the commands
    are run; the metrics of each command."""
    text, names, metrics = (DOCS / page).read_text(), {}, []
    pieces = [(match.start(), "code", match[1]) for match in CODE.finditer(text)]
    pieces += [(match.start(), "command", match[1]) for match in COMMAND.finditer(text)]
    for match in YAML.finditer(text):
        Path(match[1]).write_text(match[2])
    for _, kind, piece in sorted(pieces):
        file = re.match(r"# (\w+\.py)\n", piece)
        if kind == "command":
            command = shlex.split(piece)
            if command[0] not in STAGES:
                main([*command, *(SMALL if command[0] == "compare" else [])])
                continue
            cli = run([*command, *(SMALL if command[0] == "fit" else SMALL[2:]), "--trainer.devices=1"])
            metrics.append(dict(cli.trainer.callback_metrics))
        elif file:
            Path(file[1]).write_text(piece)
        else:
            exec(compile(piece, page, "exec"), names)
    return names, metrics


@pytest.mark.slow
def test_what_is_shown_to_extend_works(folder):
    """The methods, the backbone, the data set, the callback and the schedule, each by the command below it."""
    _, (method, stateful, backbone, data, callback, schedule) = run_page("extending.md")
    assert 0 <= method["val/personalized_accuracy"] <= 1
    assert method["val/personalized_accuracy"] == method["val/generalized_accuracy"]
    assert 0 <= stateful["val/personalized_accuracy"] <= 1
    assert "val/routed_local/conv" in backbone
    assert data["train/clients"] == 5
    assert 0 <= callback["val/clients_served"] <= 1
    assert schedule["train/client_lr_factor"] == 1  # in the first round


@pytest.mark.slow
def test_a_residual_net_is_routed_by_three_lines(folder, caplog):
    """The page's own files and command: a round on the digits, with the blocks named there and printed."""
    text = (DOCS / "models.md").read_text()
    (yaml_code,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(yaml_code.splitlines()) == 2 + 3
    (folder / "my_resnet.yaml").write_text(yaml_code)
    (code,), (command,) = CODE.findall(text), COMMAND.findall(text)
    (folder / "my_resnet.py").write_text(code)
    few = ["--data.cohort_size=4", "--data.chunk_size=4", "--data.val_clients=2", "--model.loop.local_epochs=1"]
    cli = run([*shlex.split(command), *SMALL, "--trainer.devices=1", *few])
    metrics = cli.trainer.callback_metrics
    blocks = yaml.safe_load(yaml_code)["model"]["blocks"]
    assert [name.rpartition("/")[2] for name in metrics if name.startswith("val/routed_local/")] == blocks
    assert 0 <= metrics["val/personalized_accuracy"] <= 1
    assert f"routed blocks: {', '.join(blocks)}" in caplog.text


@pytest.mark.slow
def test_the_method_shown_takes_its_gradient_elsewhere(folder):
    """With rho = 0 the very numbers of FedAvg, with a large one another step."""
    text = (DOCS / "extending.md").read_text()
    (code,) = [code for code in CODE.findall(text) if code.startswith("# my_method.py")]
    (folder / "my_method.py").write_text(code)
    norms = {}
    for method in ("FedAvg", "my_method.FedSAM --model.method.rho=0", "my_method.FedSAM --model.method.rho=1"):
        args = shlex.split(f"fit -c task/digits -c method/fedavg --model.method {method}")
        norms[method] = run([*args, *SMALL, "--trainer.devices=1"]).trainer.callback_metrics["train/update_norm"]
    first, same, other = norms.values()
    torch.testing.assert_close(first, same)
    assert abs(other - first) > 0.01 * first


def test_the_server_shown_sums_the_rounds_pseudo_gradients():
    """By hand, for two rounds: h is 1 / 4, then 1 / 4 + 2 / 4."""
    (code,) = [code for code in CODE.findall((DOCS / "extending.md").read_text()) if code.startswith("# my_dyn.py")]
    names = {}
    exec(code, names)
    w = torch.nn.Parameter(torch.tensor([3.0]))
    server = names["FedDynServer"]([w], share=0.25)
    for pseudo_gradient, after in ((1.0, 3 - 1.25), (2.0, 1.75 - 2.75)):
        w.grad = torch.tensor([pseudo_gradient])
        server.step()
        assert w.item() == after


@pytest.mark.slow
def test_several_inputs_and_texts_are_trained_on_as_shown(folder):
    """The page's own files and commands: arrays by name, and texts with a small encoder in the place of a real one."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    text = (DOCS / "data.md").read_text()
    data, backbone = CODE.findall(text)
    (settings,) = re.findall(r"^```yaml\n# my_texts.yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    named, texts = [shlex.split(command) for command in COMMAND.findall(text) if "my_" in command]
    exec(compile(data, "data.md", "exec"), {})
    (folder / "my_encoder.py").write_text(backbone)
    few = [*SMALL, "--trainer.devices=1", "--data.val_clients=2", "--model.loop.local_epochs=1"]
    metrics = run([*named, *few]).trainer.callback_metrics
    assert {"val/routed_local/hidden", "val/routed_local/head"} <= metrics.keys()

    (folder / "my_texts.yaml").write_text(settings)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "how", "sort", "call", "it"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast("vocab.txt").save_pretrained("my_model")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=len(words), **sizes)
    transformers.BertModel(config).save_pretrained("my_model")
    posts = {f"user_{i}": {"x": ["how sort it", "call it"] * 5, "kind": "qa" * 5} for i in range(8)}
    leaf = {"users": list(posts), "num_samples": [10] * 8, "user_data": posts}
    (folder / "posts.json").write_text(json.dumps(leaf))
    metrics = run(
        [*texts, *few, "--data.cohort_size=4", "--data.min_examples=5", "--data.client_fraction=1"]
    ).trainer.callback_metrics
    assert 0 <= metrics["val/generalized_accuracy"] <= 1

    page = (DOCS / "encoders.md").read_text()
    for file, content in re.findall(r"^```yaml\n# (my_\w+\.yaml)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        (folder / file).write_text(content)
    adapted, pictures = [shlex.split(command) for command in COMMAND.findall(page) if "my_" in command]
    few += ["--data.cohort_size=4", "--data.min_examples=5"]
    metrics = run([*adapted, *few, "--data.client_fraction=1"]).trainer.callback_metrics
    assert "val/routed_local/backbone.encoder.encoder.layer.0" in metrics
    adapters, head = 2 * 6 * 8 * (8 + 8), 2 * 8 + 2  # of six linear layers of 8 x 8 in each of two encoder layers
    router = 8 * 64 + 64 + 64 * 32 + 32 + 64 * 2 + 2 + 2 * (32 * 2 + 2)
    assert metrics["train/bytes_up"] == 4 * 4 * (adapters + head + router)
    np.savez("my_images.npz", x=np.zeros((80, 8, 8)), y=np.arange(80) % 3, client=np.arange(80) % 8)
    metrics = run([*pictures, *few, "--model.backbone.width=8"]).trainer.callback_metrics
    assert "val/routed_local/layer4" in metrics


@pytest.mark.slow
def test_the_callbacks_shown_work(folder, capsys):
    _, (stopping, _) = run_page("callbacks.md")
    assert "val/personalized_accuracy" in stopping
    assert "round 0: the worst tenth is at" in capsys.readouterr().out


@pytest.mark.slow
def test_serving_takes_ten_lines(folder, capsys):
    run(["fit", *DIGITS, *SMALL, "--trainer.devices=1"])
    random = np.random.default_rng(0)
    x, new = (random.integers(0, 256, size=(n, 1, 8, 8), dtype=np.uint8) for n in (20, 7))
    np.savez(folder / "client.npz", x=x, y=np.arange(20) % 10, new=new)
    capsys.readouterr()
    (code,) = CODE.findall((DOCS / "serving.md").read_text())
    assert len([line for line in code.splitlines() if line]) <= 10
    names, _ = run_page("serving.md")
    printed = [int(digit) for digit in re.findall(r"\d", capsys.readouterr().out)]
    assert printed == names["model"](names["data"].transform(torch.from_numpy(new))).argmax(-1).tolist()


@pytest.mark.slow
def test_export_takes_ten_lines_or_one_command(folder):
    """The two commands and the code; what each wrote predicts as the model does."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    run(["fit", *DIGITS, *SMALL, "--trainer.devices=1"])
    x = np.random.default_rng(0).integers(0, 256, size=(20, 1, 8, 8), dtype=np.uint8)
    np.savez(folder / "client.npz", x=x, y=np.arange(20) % 10)
    text = (DOCS / "export.md").read_text()
    commands = COMMAND.findall(text)
    assert {shlex.split(command)[0] for command in commands} == {"export", "personalize"}
    for command in commands:
        main(shlex.split(command))
    (code,) = CODE.findall(text)
    assert len([line for line in code.splitlines() if line]) <= 10
    names = {}
    exec(compile(code, "export.md", "exec"), names)
    model, inputs = names["model"], names["x"]
    program = torch.export.load("model.pt2").module()
    torch.testing.assert_close(program(inputs), model(inputs))
    assert Path("model.onnx").stat().st_size > 1000
    assert Path("server.pt2").stat().st_size > 1000


def test_the_python_interface_takes_ten_lines(folder, capsys):
    (code,) = CODE.findall((DOCS / "python_api.md").read_text())
    lines = [line for line in code.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(lines) <= 10
    run_page("python_api.md")
    assert "new clients" in capsys.readouterr().out
    header, *rows = (folder / "predictions.csv").read_text().splitlines()
    assert header.startswith("client,")
    assert rows


@pytest.mark.slow
@pytest.mark.extended  # the notebook executes the same cells
def test_the_example_runs_from_cell_to_cell(folder):
    names = runpy.run_path(str(ROOT / "examples" / "python_api.py"))
    assert len(names["curve"].values) == 2
    assert names["trainer"].current_epoch == 10
    assert (folder / "runs/python_api/checkpoints/best.ckpt").exists()
    assert (folder / "runs/python_api/predictions.csv").exists()
    assert names["tested"]["test/seen/personalized_accuracy"] > 0.3
    assert names["tested"]["test/new/personalized_accuracy"] > 0.3


@pytest.mark.slow
def test_the_notebook_shown_is_the_example_executed(folder):
    """`python -m tools.notebook_page` writes it anew: its code is that of the example, its figures are there."""
    pytest.importorskip("jupytext", reason="jupytext is not installed")
    from tools import notebook_page

    page = notebook_page.PAGE.read_text()
    text, figures = notebook_page.page(notebook_page.execute(notebook_page.notebook(), folder))
    assert CODE.findall(text) == CODE.findall(page)
    assert len(CODE.findall(page)) >= 5
    assert figures.keys() == {path.name for path in notebook_page.FIGURES.iterdir()} != set()
    assert all(f"](figures/notebook/{name})" in page for name in figures)
    assert "new clients" in text
    assert re.search(r"of new clients: 0\.\d+", text)


@pytest.mark.slow
def test_the_site_is_built_without_warnings_or_network(folder, monkeypatch):
    """Strictly, as `make docs` does: links, anchors and docstrings lead somewhere, and equations are marked."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    # a proxy that nobody answers: whatever is fetched fails
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder / "site")]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True, check=False
    )
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    assert '<span class="arithmatex">\\(' in (folder / "site/methods/flow.html").read_text()
    reference = (folder / "site/api/methods.html").read_text()
    assert all(f'id="{cls.__module__}.{cls.__name__}"' in reference for cls in METHODS.values())
    callback_page = (folder / "site/api/callbacks.html").read_text()
    assert all(f".{listed}</span>" in callback_page or f'.{listed}"' in callback_page for listed in callbacks.__all__)


def test_every_page_is_on_the_site():
    listed = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(name(page) for page in PAGES)


@pytest.mark.slow
def test_the_transformer_shown_trains(folder):
    (code,) = CODE.findall((DOCS / "faq.md").read_text())
    (folder / "my_transformer.py").write_text(code)
    (command,) = [shlex.split(line) for line in COMMAND.findall((DOCS / "faq.md").read_text()) if "my_" in line]
    metrics = run([*command, *SMALL, "--trainer.devices=1"]).trainer.callback_metrics
    assert {"val/routed_local/embed", "val/routed_local/layer", "val/routed_local/head"} <= metrics.keys()


@pytest.mark.slow
def test_the_report_is_written_where_the_page_says(folder):
    run_page("report.md")
    assert (folder / "runs/digits/flow/report.html").exists()
    assert list((folder / "runs/digits/flow/figures").glob("*.png"))


def commands_by_page():
    """The commands of a run by the first page that has them; one of them for each set of settings."""
    found = {}
    for page in PAGES:
        for command in COMMAND.findall(page.read_text()):
            args = shlex.split(command)
            if args[0] in ("compare", "configs", "export", "personalize", "report", "tune") or "my_" in command:
                continue
            if "--ckpt_path" in args:
                at = args.index("--ckpt_path")
                del args[at : at + 2]
            # a test or a prediction takes the settings of the fit
            settings = args if any("help" in arg for arg in args) else args[1:]
            found.setdefault(tuple(settings), (page, args))
    return {page: [args for where, args in found.values() if where == page] for page, _ in found.values()}


def test_the_tuning_commands_parse():
    commands = [shlex.split(command) for page in PAGES for command in COMMAND.findall(page.read_text())]
    tuning = [tune_command.parse(words) for command, *words in commands if command == "tune"]
    assert len(tuning) >= 3
    searched = read_values(None)
    assert all(options.methods.keys() <= searched.keys() for options in tuning)


@pytest.mark.parametrize(
    "commands",
    [
        # each of the paper's tasks takes its time
        pytest.param(commands, id=name(page), marks=pytest.mark.slow if name(page) == "paper.md" else [])
        for page, commands in commands_by_page().items()
    ],
)
def test_commands_parse(commands, monkeypatch, capsys):
    """Those that a page's own test does not run."""
    monkeypatch.chdir(ROOT)
    for args in commands:
        command = shlex.join(args)
        if any("help" in arg for arg in args):
            with pytest.raises(SystemExit) as stop:
                main(args)
            assert stop.value.code == 0, command
            assert "usage:" in capsys.readouterr().out
            continue
        with pytest.raises(SystemExit) as stop:
            main([*args, "--print_config"])
        assert stop.value.code == 0, command
        assert "method" in yaml.safe_load(capsys.readouterr().out)["model"]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        file = Path(os.path.normpath(page.parent / target)) if target else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{target}#{anchor}"


@pytest.mark.parametrize("stem", sorted(METHODS))
def test_a_method_has_a_page_with_its_parameters(stem):
    text = (DOCS / "methods" / f"{stem}.md").read_text()
    cls = METHODS[stem]
    assert f"Class `{cls.__name__}`" in re.sub(r"\s+", " ", text)
    shown = dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \| [^|]+ \|$", text, re.MULTILINE))
    given = {
        key: getattr(parameter.default, "__name__", None) or {None: "null"}.get(parameter.default, parameter.default)
        for key, parameter in inspect.signature(cls).parameters.items()
    }
    assert shown == {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in given.items()}
    for word in ("**Sent:**", "**Kept:**", "$$"):
        assert word in text
    assert "departures" in text.lower(), "say where it departs from its paper"
    stateless = re.search(r"\*\*Kept:\*\* nothing", text)
    assert bool(stateless) == (not cls.private)
    assert f"({stem}.md)" in (DOCS / "methods" / "README.md").read_text()


@pytest.mark.slow
def test_every_metric_is_explained(folder):
    """Those of a run with all that is logged, by their names without prefixes of populations and models."""
    options = ["--data.dropout=0.2", "--trainer.callbacks+=ConvergenceDiagnostics"]
    cli = run(["fit", *DIGITS, *SMALL, "--trainer.devices=1", *options])
    text = (DOCS / "metrics.md").read_text()
    logged = {re.sub(r"^(val/|diagnostics/)", "", metric) for metric in cli.trainer.callback_metrics}
    for metric in sorted(logged):
        general = re.sub(r"^(generalized|personalized)_accuracy_(client_mean|p\d+|worst|client)", r"..._\2", metric)
        general = re.sub(r"^(train/)\w+_loss$", r"\1<group>_loss", general)
        general = re.sub(r"/(linear1|head)$", "/<block>", general)
        assert f"`{general}" in text, metric
    assert {"train/dropped_clients", "train/late_clients", "gradient_norm", "gain_over_mixture"} <= logged


def test_every_callback_is_listed():
    text = (DOCS / "callbacks.md").read_text()
    assert all(f"`{listed}`" in text for listed in callbacks.__all__)
