"""Files that need no flow_pl give the outputs of the model that they were made from."""

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flow_pl import FederatedLoop, FederatedModule
from flow_pl.__main__ import main
from flow_pl.cli import run
from flow_pl.errors import ConfigurationError
from flow_pl.export import export_model
from flow_pl.methods import FedAvg, FineTuning, Flow
from flow_pl.methods.flow_evidence import EvidenceFlow
from flow_pl.models import EMNISTCNN, MLP, NextCharacterLSTM, NextWordLSTM, ResNet18, VisionTransformer
from flow_pl.models.normalization import converted
from flow_pl.models.routers import InstanceRouter, SequenceRouter
from flow_pl.serving import ServerModel, load, load_format, load_kept, personalize
from flow_pl.tasks import Classification, NextToken
from tests.models.nets import ResNet as ResidualNet
from tests.test_module import module as trained
from tests.test_serving import METHODS, X, Y, with_each_method

TOKENS, T = 11, 3


def pictures(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, *shape, generator=generator), torch.arange(4) % 3


def sequences():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(1, TOKENS, (4, T), generator=generator) for _ in range(2))


BACKBONES = {
    "mlp": (lambda: MLP(8, 3, (6,)), lambda: (X, Y)),
    "cnn": (lambda: EMNISTCNN(3, (1, 6, 6)), lambda: pictures(1, 6, 6)),
    "resnet": (lambda: ResNet18(3, 3, 2), lambda: pictures(3, 8, 8)),
    "vit": (lambda: VisionTransformer(3, 3, depth=1, width=8, heads=2), lambda: pictures(3, 8, 8)),
    "words": (lambda: NextWordLSTM(TOKENS, 4, 6, 3), sequences),
    "characters": (lambda: NextCharacterLSTM(TOKENS, 4, 6), sequences),
}


RESIDUAL = (lambda: converted(ResidualNet(3, 3, layers=(1, 1, 1, 1)), "frozen"), lambda: pictures(3, 8, 8))
"""A module that is no Sequential."""


def routed(backbone, **settings):
    if backbone in ("words", "characters"):
        return Flow(router=lambda blocks: SequenceRouter(blocks, (5,), (4,)), **settings)
    return Flow(router=lambda blocks: InstanceRouter(blocks, (6,)), **settings)


KINDS = {
    "plain": lambda backbone: FineTuning(),
    "soft": routed,
    "hard": lambda backbone: routed(backbone, routing="hard"),
    "votes": lambda backbone: EvidenceFlow(neighbours=3, neighbour_weight=0.4),
}

FORMS = ("torch_export", "onnx", "executorch")
QUICK = ("ditto", "flow", "hypcluster", "interpolation_votes")
"""A model of its own, a mixture, one of several, a vote of neighbours."""


def personal(backbone, kind):
    make, examples = BACKBONES.get(backbone, RESIDUAL)
    x, y = examples()
    torch.manual_seed(0)
    task = NextToken() if y.ndim > 1 else Classification()
    method = KINDS[kind](backbone)
    module = FederatedModule(make(), method, FederatedLoop(1, None, 4, lambda p: torch.optim.SGD(p, lr=0.05)), task)
    return personalize(module, x, y), x


def reloaded(path, form):
    """What a program that knows nothing of this project makes of the file."""
    if form == "torch_export":
        return torch.export.load(path).module()
    if form == "onnx":
        library = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
        options = library.SessionOptions()
        options.intra_op_num_threads = 1
        session = library.InferenceSession(path, options)
        assert session.get_inputs()[0].shape[0] == session.get_outputs()[0].shape[0] == "batch"
        return lambda x: torch.from_numpy(session.run(["outputs"], {"x": x.numpy()})[0])
    runtime = pytest.importorskip("executorch.runtime", reason="ExecuTorch is not installed").Runtime.get()
    content = Path(path).read_bytes()  # which the program goes on reading
    program = runtime.load_program(content)
    method = program.load_method("forward")
    return lambda x, alive=(content, program): method.execute([x.contiguous()])[0].clone()


def check(tmp_path, model, x, form, **options):
    """For batches of one, two and all instances, also where the ways of the instances differ."""
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    if form == "executorch":
        pytest.importorskip("executorch.exir", reason="ExecuTorch is not installed")
    path = tmp_path / "model.bin"
    export_model(model, path, x, form, **options)
    program = reloaded(str(path), form)
    for size in (1, 2, len(x)):
        torch.testing.assert_close(program(x[:size]), model(x[:size]), atol=1e-5, rtol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["model.bin"]


@pytest.mark.parametrize(
    "name",
    # the ONNX file of each method is made of such a program, too
    [name if name in QUICK else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.extended]) for name in METHODS],
)
def test_a_program_of_every_method(tmp_path, name):
    check(tmp_path, personalize(trained(METHODS[name]()), X, Y), X, "torch_export")


@pytest.mark.slow
@with_each_method
def test_onnx_of_every_method(tmp_path, make):
    check(tmp_path, personalize(trained(make()), X, Y), X, "onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "kind", "form"),
    [
        # a third in the gate: every backbone and every kind in every format
        pytest.param(backbone, kind, form, marks=[] if (i + j + k) % 3 == 0 else pytest.mark.extended)
        for (i, backbone), (j, kind), (k, form) in itertools.product(*map(enumerate, (BACKBONES, KINDS, FORMS)))
    ],
)
def test_every_backbone_kind_and_format(tmp_path, backbone, kind, form):
    check(tmp_path, *personal(backbone, kind), form)


@pytest.mark.slow
def test_a_module_that_is_no_sequential_runs_elsewhere(tmp_path):
    check(tmp_path, *personal("residual", "hard"), "onnx")


@pytest.mark.parametrize("make", [lambda: FedAvg(), METHODS["hypcluster"]], ids=["fedavg", "hypcluster"])
def test_the_servers_model_is_exported(tmp_path, make):
    check(tmp_path, ServerModel(trained(make())), X, "torch_export")


def test_hard_routing_takes_each_instances_own_way(tmp_path):
    """Instances of one batch that go different ways: a router that looks at the sign of the first feature."""
    method = routed("mlp", routing="hard")
    module = FederatedModule(MLP(8, 3, (6,)), method, FederatedLoop(1, batch_size=4))
    model = personalize(module, X, Y)
    with torch.no_grad():
        for name, p in model.groups.named_buffers():
            if name.startswith("router"):
                p.zero_()
            if name == "router.exits.layers.0.weight":
                p[0, 0] = 1.0
            if name.startswith("router.exits.heads") and name.endswith("weight"):
                p[1, 0] = 9.0
    ways = module.method.predict(model.tensors(), X).routes[:, 0]
    assert ways.any()
    assert not ways.all()
    check(tmp_path, model, X, "torch_export")


@pytest.mark.parametrize("kind", ["plain", "soft"])
def test_weights_alone_are_those_of_the_model(tmp_path, kind):
    library = pytest.importorskip("safetensors", reason="safetensors is not installed")
    model, x = personal("mlp", kind)
    path = tmp_path / "weights.safetensors"
    export_model(model, path, x, "safetensors")
    with library.safe_open(path, "pt") as file:
        found, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert about["method"] == ("FineTuning" if kind == "plain" else "Flow")
    if kind == "plain":  # of a single model by the backbone's own names
        plain = MLP(8, 3, (6,))
        plain.load_state_dict(found)
        torch.testing.assert_close(plain(x), model(x))
    else:
        assert '"routing": "soft"' in about["settings"]
        expected = {f"{group}.{name}": p for group, named in model.tensors().items() for name, p in named.items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], p) for name, p in expected.items())


def test_buffers_of_blocks_are_exported(tmp_path):
    class Shifted(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.register_buffer("shift", torch.arange(3.0))

        def forward(self, x):
            return super().forward(x) + self.shift

    model = personalize(FederatedModule(nn.Sequential(Shifted()), FineTuning(), FederatedLoop(1, batch_size=5)), X, Y)
    check(tmp_path, model, X, "torch_export")
    assert set(model.weights()) == {"0.weight", "0.bias", "0.shift"}


class Counted(nn.Linear):
    """Its code depends on the number of instances."""

    def forward(self, x):
        return super().forward(x) * (2 if len(x) == 2 else 1)


class Asked(nn.Linear):
    """Its code depends on a value."""

    def forward(self, x):
        return super().forward(x) * (2 if x.sum() > 0 else 1)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.rand(3)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Counted, "the model cannot be exported as a program .*number of instances.*safetensors"),
        (Asked, "the model cannot be exported as a program .*depend on the values"),
        (Noisy, "gives other outputs than the model: a block of the backbone draws random numbers"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, block, words):
    model = ServerModel(FederatedModule(nn.Sequential(block(8, 3)), FedAvg(), FederatedLoop(1, batch_size=5)))
    with pytest.raises(ConfigurationError, match=words):
        export_model(model, tmp_path / "model.pt2", X)
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_refused(tmp_path, monkeypatch):
    model, x = personal("mlp", "plain")
    path = tmp_path / "model.bin"
    with pytest.raises(ConfigurationError, match=r"format is tflite, expected 'torch_export' or 'onnx' or"):
        export_model(model, path, x, "tflite")
    with pytest.raises(ConfigurationError, match="max_batch is 0"):
        export_model(model, path, x, max_batch=0)
    with pytest.raises(ConfigurationError, match=r"example has shape \[0, 8\], expected at least one instance"):
        export_model(model, path, x[:0])
    monkeypatch.setattr("flow_pl.export.LARGEST_ONNX", 100)
    with pytest.raises(ConfigurationError, match=r"bytes of weights, an ONNX file can hold 100: use torch_export"):
        export_model(model, path, x, "onnx")
    assert not path.exists()


@pytest.mark.parametrize("form", ["onnx", "executorch", "safetensors"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, form):
    for name in (form, f"{form}.exir"):
        monkeypatch.setitem(sys.modules, name, None)
    model, x = personal("mlp", "plain")
    extra = "executorch" if form == "executorch" else "export"
    with pytest.raises(
        ConfigurationError, match=rf"the format {form} needs {form} .*pip install .*{form}>=.* {extra} of"
    ):
        export_model(model, tmp_path / "model.bin", x, form)


def test_a_largest_batch_of_one(tmp_path):
    model, x = personal("mlp", "soft")
    export_model(model, tmp_path / "one.pt2", x, max_batch=1)
    program = torch.export.load(tmp_path / "one.pt2").module()
    torch.testing.assert_close(program(x[:1]), model(x[:1]))


# The commands


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A round of Flow and one of Ditto: their configurations, checkpoints and data."""
    found = {}
    for method in ("flow", "ditto"):
        folder = tmp_path_factory.mktemp(method)
        options = [f"--trainer.default_root_dir={folder}", f"--data.cache_dir={folder}/cache"]
        options += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.devices=1"]
        config = ("task/synthetic", f"method/{method}")
        cli = run(["fit", *(f"--config={name}" for name in config), *options, "--trainer.limit_val_batches=0"])
        checkpoint = folder / "checkpoints" / "last.ckpt"
        given = [
            *(f"--config={name}" for name in config),
            f"--ckpt_path={checkpoint}",
            f"--data.cache_dir={folder}/cache",
        ]
        found[method] = given, config, checkpoint, cli
    return found


@pytest.fixture
def client(tmp_path):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(9, 20)).astype(np.float32), np.arange(9) % 5
    np.savez(tmp_path / "client.npz", x=x, y=y)
    return tmp_path / "client.npz", torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.slow
def test_a_client_is_personalized_by_one_command(runs, client, tmp_path, capsys):
    given, config, checkpoint, _ = runs["flow"]
    path, x, y = client
    out = tmp_path / "new" / "model.pt2"
    main(["personalize", *given, "--data", str(path), "--out", str(out)])
    assert capsys.readouterr().out.startswith(f"{out}: torch_export, {os.path.getsize(out):,} bytes; takes [batch, 20]")
    expected = personalize(load(config, checkpoint)[0], x, y)
    torch.testing.assert_close(torch.export.load(out).module()(x), expected(x))
    main(["personalize", *given, "--data", str(path), "--out", str(out), "--model.method.routing=hard"])
    hard = personalize(load(config, checkpoint, "--model.method.routing=hard")[0], x, y)
    torch.testing.assert_close(torch.export.load(out).module()(x), hard(x))


def test_a_client_of_the_run_and_the_server_are_exported(runs, client, tmp_path, capsys):
    given, config, checkpoint, cli = runs["ditto"]
    data, (sampled, *_) = cli.datamodule, cli.model.states.known().tolist()
    name = data.client_name(sampled)
    path, x, y = client
    module, _ = load(config, checkpoint)
    kept = load_kept(module, checkpoint, name)
    out = tmp_path / "model.pt2"

    def exported(*options):
        main([options[0], *given, "--out", str(out), *options[1:]])
        return torch.export.load(out).module()(x)

    of_client = personalize(module, *data.examples(sampled, "train"), kept=kept)
    torch.testing.assert_close(exported("export", "--client", name), of_client(x))
    torch.testing.assert_close(exported("export"), module(x))
    torch.testing.assert_close(exported("export", "--example", str(path)), module(x))
    found = exported("personalize", "--data", str(path), "--kept", name)
    torch.testing.assert_close(found, personalize(module, x, y, kept=kept)(x))
    capsys.readouterr()
    fresh = min(set(data.federation.seen.tolist()) - set(cli.model.states.known().tolist()))
    exported("export", "--client", data.client_name(fresh))
    assert "has not been sampled: it starts from the server's model" in capsys.readouterr().out


def test_a_clients_own_arrays_are_read_as_those_of_the_run(tmp_path, monkeypatch, capsys):
    """Bytes of two levels are not scaled, and texts are the classes of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOW_PL_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    x, y = random.integers(0, 2, size=(60, 6), dtype=np.uint8), np.array(["cat", "dog", "emu"] * 20)
    np.savez("run.npz", x=x, y=y, client=np.arange(60) % 6)
    small = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.devices=1", "--data.cohort_size=3"]
    config = ["--config=task/array", "--config=method/fine_tuning", "--data.path=run.npz"]
    run(["fit", *config, *small, "--trainer.limit_val_batches=0", "--trainer.default_root_dir=run"])
    checkpoint = "run/checkpoints/last.ckpt"
    assert load_format(checkpoint) == ("bool", ("cat", "dog", "emu"))
    np.savez("client.npz", x=x[:9], y=y[:9])
    given = ["-c", "run/config.yaml", "--ckpt_path", checkpoint, "--out", "model.pt2"]
    capsys.readouterr()
    main(["personalize", *given, "--data", "client.npz"])
    assert capsys.readouterr().out.endswith("\nClasses in the order of the outputs: cat, dog, emu.\n")
    inputs = torch.from_numpy(x[:9]).float()
    expected = personalize(load(None, checkpoint)[0], inputs, np.arange(9) % 3)
    torch.testing.assert_close(torch.export.load("model.pt2").module()(inputs), expected(inputs))
    np.savez("wide.npz", x=x[:, :4])
    np.savez("gnu.npz", x=x[:1], y=["gnu"])
    np.savez("others.npz", x=x, y=np.char.replace(y, "cat", "gnu"), client=np.arange(60) % 6)
    with pytest.raises(SystemExit):
        main(["test", "--config=run/config.yaml", "--data.path=others.npz"])
    assert "class 0 was 'cat' and is 'dog'" in capsys.readouterr().err
    for args, words in (
        (["export", "--example", "wide.npz"], "the data's features have shape [4]"),
        (["personalize", "--data", "gnu.npz"], "gnu.npz: y has the label 'gnu', expected one of the run's classes"),
    ):
        with pytest.raises(SystemExit):
            main([args[0], *given, *args[1:]])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["personalize", "--format", "tflite"], "format is tflite, expected 'torch_export'"),
        (["personalize", "--data", "absent.npz"], "there is no file absent.npz: write one with numpy.savez"),
        (["personalize", "--data", "no_y.npz"], "no_y.npz has no y, only x: name its arrays so"),
        (["personalize", "--data", "unlabelled.npz"], "unlabelled.npz: none of the 9 examples has a label"),
        (["personalize", "--data", "wide.npz"], "features have shape [7]"),
        (["personalize", "--data", "broken.npz"], "broken.npz cannot be read"),
        (["personalize", "--kept", "0"], "clients of Flow keep nothing between rounds"),
        (
            ["personalize", "--nothing=1"],
            "there is no option --nothing. `flow-pl personalize --help` lists the options",
        ),
        (["personalize", "more"], "there is no option more"),
        (["personalize", "--ckpt_path", "absent.ckpt"], "the checkpoint absent.ckpt does not exist"),
        (["personalize", "--out", "."], ". cannot be written to: give --out a file"),
        (["personalize", "--out", "client.npz/model.pt2"], "client.npz cannot be created"),
        (["export", "--client", "nobody"], "--client is 'nobody', which is not among the run's clients"),
        (["export", "--example", "no_x.npz"], "no_x.npz has no x"),
    ],
)
def test_what_a_command_cannot_use_is_one_line(runs, client, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    _, x, y = client
    np.savez("no_y.npz", x=x.numpy())
    np.savez("no_x.npz", y=y.numpy())
    np.savez("unlabelled.npz", x=x.numpy(), y=np.full(9, -1))
    np.savez("wide.npz", x=x.numpy()[:, :7], y=y.numpy())
    Path("broken.npz").write_bytes(b"PK")
    given = [*runs["flow"][0], "--out", "model.pt2"]
    given += ["--data", "client.npz"] if args[0] == "personalize" else []
    with pytest.raises(SystemExit) as stop:
        main([args[0], *given, *args[1:]])
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert words in said.err
    assert len(said.err.splitlines()) == 1, said.err
    assert not Path("model.pt2").exists()
