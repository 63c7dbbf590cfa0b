"""The page on a test: of real runs on numbers, pictures and text, and looked at in a browser."""

import csv
import html
import json
import re
import shutil
import socketserver
import subprocess
import sys
import threading

import numpy as np
import pytest
import wandb
import yaml

from flow_pl.__main__ import main
from flow_pl.callbacks import RoutingReport
from flow_pl.cli import run
from flow_pl.errors import ConfigurationError
from flow_pl.report.tables import block_table
from tests.data.published_formats import write_leaf
from tests.test_cli import TINY
from tests.wandb_files import offline_runs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
BOTH = ["--trainer.callbacks+=LearningCurves", "--trainer.callbacks+=RoutingReport"]
NASTY = "<i>&nbsp;"
TEXTS = ["to be or not to be", "that is the question", "whether it is nobler <b>in</b> the mind to suffer"]


def command(folder, subcommand, *options, **sections):
    """A command of a tiny run in a folder, with some sections of its configuration replaced."""
    settings = yaml.safe_load(TINY.format(root=folder))
    settings = {**settings, **{name: {**settings[name], **changed} for name, changed in sections.items()}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    words = ["--config", str(folder / "tiny.yaml")]
    if subcommand == "test" and not (folder / "run" / "checkpoints").exists():
        run(["fit", *words, *(str(option) for option in options if str(option).startswith(("--data", "--model")))])
    return run([subcommand, *words, *map(str, options)])


def reported(folder, *options, **sections):
    """Fit and test with the report; returns the finished command of the test and the page."""
    command(folder, "fit", *BOTH, *options, **sections)
    last = folder / "run" / "checkpoints" / "last.ckpt"
    cli = command(folder, "test", *BOTH, *options, "--ckpt_path", last, **sections)
    return cli, (folder / "run" / "report.html").read_text()


def digits():
    data = {"class_path": "DigitsData", "init_args": {"num_clients": 8, "cohort_size": 3, "new_client_fraction": 0.25}}
    return {"data": data}


def backbone(class_path, **settings):
    return {"class_path": class_path, "init_args": settings}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A run on digits: its folder, command and page."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    folder = tmp_path_factory.mktemp("digits")
    network = backbone("MLP", in_features=64, num_classes=10, hidden=[8])
    method = {"class_path": "Flow", "init_args": {"router": backbone("InstanceRouter", hidden=[4])}}
    clients = ["--trainer.callbacks+=ClientResults", f"--trainer.callbacks.path={folder / 'clients.csv'}"]
    cache = f"--data.cache_dir={folder / 'cache'}"
    cli, page = reported(folder, cache, *clients, **digits(), model={"backbone": network, "method": method})
    return folder, cli, page


def figure_names(folder):
    return {path.stem for path in (folder / "run" / "figures").glob("*")}


def test_a_run_on_pictures_has_everything(pictures):
    folder, cli, page = pictures
    names = ["curves", "route_rounds", "gains", "clients", "ranks", "sizes", "routes", "route_probabilities"]
    names += ["route_clients", "route_agreement", "route_classes", "instances_local", "instances_global"]
    assert figure_names(folder) == set(names)
    assert page.count('src="data:image/png;base64,') == len(names)
    assert re.findall(r'<section id="(\w+)"', page) == ["rounds", "results", "clients", "routes", "instances"]
    value = 100 * float(cli.trainer.callback_metrics["test/seen/personalized_accuracy_client_gini"])
    assert f"<td>{value:.2f}</td>" in page
    assert not list((folder / "run").rglob("*.part"))


def test_the_page_refers_to_nothing_but_itself(pictures):
    references = re.findall(r'(?:src|href|action|data|poster|srcset)\s*=\s*"([^"]*)"', pictures[2])
    assert len(references) > 10
    assert all(reference.startswith(("data:image/png;", "#")) for reference in references)
    assert not re.search(r"url\(|@import|<script|<link|<iframe|https?://", pictures[2])


class Keeping(RoutingReport):
    """Keeps what was found out."""

    def report(self, trainer, pl_module, rounds, results):
        self.kept = self.evidence
        super().report(trainer, pl_module, rounds, results)


def looked_at(folder, *options, **settings):
    """The evidence of a test on numbers, and the metrics of the test."""
    keeping = {"class_path": "tests.callbacks.test_routing_report.Keeping", "init_args": settings}
    cli = command(folder, "test", *options, "--trainer.callbacks", json.dumps([keeping]))
    (report,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, Keeping))
    return report.kept, {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


@pytest.mark.parametrize("chunk_size", [2, 10])
def test_routes_are_those_of_the_test(tmp_path, chunk_size):
    """Dropout included: personalized once more, clients route as they were tested."""
    evidence, metrics = looked_at(tmp_path, f"--data.chunk_size={chunk_size}")
    for population, routes in evidence.routes.items():
        expected = [metrics[f"test/{population}/routed_local/{block}"] for block in evidence.blocks]
        assert routes.share.tolist() == pytest.approx(expected)
        assert len(routes.clients) == len(evidence.clients[population])
    gains = [client.personalized - client.generalized for client in evidence.clients["seen"]]
    assert np.mean(gains) == pytest.approx(metrics["test/seen/gain_client_mean"])


def test_some_clients_are_looked_at_in_whole_chunks_of_all_sizes(tmp_path):
    """Six seen clients in chunks of one, by decreasing size: the first, the third and the fifth."""
    evidence, _ = looked_at(tmp_path, "--data.chunk_size=1", clients=3, common=0)
    assert len(evidence.routes["seen"].clients) == 3
    assert len(evidence.clients["seen"]) == 6
    sizes = {client.name: client.examples for client in evidence.clients["seen"]}
    chosen = [sizes[evidence.names[client.client]] for client in evidence.routes["seen"].clients]
    assert chosen == sorted(sizes.values(), reverse=True)[::2]
    assert evidence.agreement is None


def test_a_router_that_is_not_adapted_agrees_with_itself(tmp_path):
    """It sees the instance alone, and so says the same for every client."""
    evidence, _ = looked_at(tmp_path, "--model.method.adapt_router=false")
    assert evidence.agreement.same == pytest.approx([1, 1])
    assert evidence.agreement.difference == pytest.approx([0, 0])
    table = block_table(evidence)
    assert [row[table.columns.index("agreement, pairs of clients")] for row in table.rows] == [1, 1]


def test_one_way_per_client_is_explained_by_the_client(tmp_path):
    evidence, _ = looked_at(tmp_path, "--model.method.route_by=client")
    by_client, by_instance = evidence.all_routes.explained
    assert by_instance == pytest.approx([0, 0], abs=1e-9)
    assert (by_client > 1e-9).all()


@pytest.mark.slow
def test_two_processes_write_the_page_of_one(tmp_path):
    """Dropout included; pictures aside, where the last bit may show."""
    settings = yaml.safe_load(TINY.format(root=tmp_path))
    pages = {}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(tmp_path / "fit.yaml")])
    trained = ["--ckpt_path", str(tmp_path / "run" / "checkpoints" / "last.ckpt")]
    for processes in (1, 2):
        settings["trainer"] |= {"default_root_dir": str(tmp_path / str(processes)), "devices": processes}
        settings["trainer"]["strategy"] = "ddp" if processes == 2 else "auto"
        path = tmp_path / f"{processes}.yaml"
        path.write_text(yaml.safe_dump(settings))
        words = [sys.executable, "-m", "flow_pl", "test", "--config", str(path), "--trainer.callbacks+=RoutingReport"]
        done = subprocess.run([*words, *trained], capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        page = (tmp_path / str(processes) / "report.html").read_text()
        pages[processes] = re.sub(r'src="[^"]*"', "", page)
    assert pages[1].count("<img") > 8
    assert pages[1] == pages[2]


def test_a_method_without_routes_has_its_clients_alone(tmp_path):
    model = {"method": {"class_path": "FineTuning", "init_args": {}}}
    _, page = reported(tmp_path, model={**yaml.safe_load(TINY.format(root=tmp_path))["model"], **model})
    assert re.findall(r'<section id="(\w+)"', page) == ["rounds", "results", "clients"]
    assert figure_names(tmp_path) == {"curves", "gains", "clients", "ranks", "sizes"}


def test_a_fit_without_its_log_is_told_how_to_have_curves(tmp_path):
    """They are those of the CSV log, where there is one."""
    command(tmp_path, "test", "--trainer.callbacks+=RoutingReport")
    assert "curves" in figure_names(tmp_path)
    for log in (tmp_path / "run" / "logs").glob("*/metrics.csv"):
        log.unlink()
    shutil.rmtree(tmp_path / "run" / "figures")
    command(tmp_path, "test", "--trainer.callbacks+=RoutingReport")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "add the callback LearningCurves" in page
    assert "curves" not in figure_names(tmp_path)


def texts(folder):
    """Roles with lines, the name of one being no HTML, and a character model."""
    users = {name: {"x": TEXTS * 3} for name in ("a", "b", "c", "d", NASTY)}
    data = {
        "class_path": "LeafData",
        "init_args": {
            "train": str(write_leaf(folder / "train.json", users)),
            "encoding": {"class_path": "NextCharacter", "init_args": {"text": "x", "length": 12, "characters": None}},
            "cohort_size": 2,
            "new_client_fraction": 0.2,
            "cache_dir": str(folder / "cache"),
        },
    }
    router = backbone("SequenceRouter", hidden=[4], hidden_behind=[4])
    model = {
        "backbone": backbone("NextCharacterLSTM", num_tokens=90, embedding=3, hidden=4),
        "objective": "NextToken",
        "method": {"class_path": "Flow", "init_args": {"router": router}},
    }
    return {"data": data, "model": model}


@pytest.mark.slow
def test_text_is_shown_by_its_tokens(tmp_path):
    _, page = reported(tmp_path, **texts(tmp_path))
    assert {"instances_local", "instances_global"} < figure_names(tmp_path)
    lines = [
        "".join(re.findall(r"<span style=\"background:#[0-9a-f]{6}\">([^<]*)</span>", found)).replace("␣", " ")
        for found in re.findall(r'<div class="tokens">(.*?)</div>', page)
    ]
    assert len(lines) == 2 * 12
    shown = [html.unescape(line) for line in lines]
    assert all(any(line.removeprefix("<bos>") in text for text in TEXTS) for line in shown)
    assert any("<b>" in line or "b>" in line for line in shown), "text of the data that looks like HTML"
    assert NASTY not in page
    assert html.escape(NASTY) in page


def test_tables_and_figures_reach_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    logger = ["--trainer.logger=WandbLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.offline=true"]
    try:
        command(tmp_path, "test", *BOTH, *logger)
    finally:
        wandb.finish()
    (logged,) = offline_runs(tmp_path)
    tables = {}
    for name in ("clients", "blocks", "classes"):
        (row,) = logged.rows(f"report/{name}/path")
        tables[name] = json.loads((logged.folder / "files" / row[f"report/{name}/path"]).read_text())
    assert len(tables["clients"]["data"]) == 8
    assert [row[0] for row in tables["blocks"]["data"]] == ["linear1", "head"]
    assert tables["classes"]["columns"] == ["class", "decisions", "linear1", "head"]
    for figure in ("gains", "route_probabilities", "instances_local"):
        assert logged.rows(f"figures/{figure}/filenames"), figure


def test_unusable_settings_are_refused(tmp_path, monkeypatch, capsys):
    for settings in ({"path": "report.pdf"}, {"clients": 0}, {"common": -1}, {"instances": 0}):
        with pytest.raises(ConfigurationError):
            RoutingReport(**settings)
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(root=tmp_path))
    main(["fit", "--config", str(config)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main(["test", "--config", str(config), "--trainer.callbacks+=RoutingReport"])
    assert "RoutingReport needs matplotlib" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a page in a headless browser behind a proxy; returns its DOM and the hosts that it asked for."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on the PATH, in which the page could be looked at")
    asked, folder = [], tmp_path_factory.mktemp("browser")

    class Refuse(socketserver.StreamRequestHandler):
        def handle(self):
            if line := self.rfile.readline().decode(errors="replace").strip():  # opened ahead, it may ask for nothing
                asked.append(re.sub(r"^\w+ (?:https?://)?([^:/ ]*).*", r"\1", line))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refuse) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def call(path, *options):
            asked.clear()
            proxy = [f"--proxy-server=127.0.0.1:{server.server_address[1]}", "--proxy-bypass-list=<-loopback>"]
            quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
            quiet += [
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-dev-shm-usage",
                f"--user-data-dir={folder}",
            ]
            done = subprocess.run(
                [BROWSER, *quiet, *proxy, *options, path.as_uri()], capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            # the browser's maker is asked for updates, whatever the page
            own = ("google.com", "googleapis.com", "gvt1.com")
            return done.stdout, {host for host in asked if not host.endswith(own)}

        yield call
        server.shutdown()


def widths(browse, folder, text, width):
    """Widths of the window and of the content, in a frame: a browser's own window has a least width."""
    measure = """<script>addEventListener("load", () => {
        const page = document.querySelector("iframe").contentWindow
        document.title = page.innerWidth + " " + page.document.documentElement.scrollWidth + " "
            + [...page.document.images].filter(image => image.naturalWidth > 0).length
    })</script>"""
    frame = f'<iframe style="border:0;width:{width}px;height:800px" srcdoc="{html.escape(text)}"></iframe>'
    path = folder / "frame.html"
    path.write_text(f"<!doctype html><title></title>{frame}{measure}")
    dom, _ = browse(path, "--dump-dom", "--virtual-time-budget=5000")
    return [int(number) for number in re.search(r"<title>(\d+) (\d+) (\d+)</title>", dom).groups()]


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_in_a_browser_it_fits_its_window_and_shows_its_pictures(browse, pictures, tmp_path, width):
    window, content, shown = widths(browse, tmp_path, pictures[2], width)
    assert window == width
    assert content <= width
    assert shown == pictures[2].count("<img ")
    wider = pictures[2].replace("</main>", f'<div style="width:{width + 100}px">wide</div></main>')
    assert widths(browse, tmp_path, wider, width)[1] > width, "this test can fail"


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1200, 900)])
def test_in_a_browser_the_first_figure_is_on_the_first_screen(browse, pictures, tmp_path, width, height):
    """And what is written in it is at least nine pixels high: its fonts have nine points."""
    measure = """<script>addEventListener("load", () => {
        const image = document.querySelector("iframe").contentWindow.document.querySelector("figure img")
        const box = image.getBoundingClientRect()
        document.title = Math.round(box.bottom) + " " + Math.round(9 / 72 * 160 * box.width / image.naturalWidth)
    })</script>"""
    frame = f'<iframe style="border:0;width:{width}px;height:{height}px" srcdoc="{html.escape(pictures[2])}"></iframe>'
    path = tmp_path / "frame.html"
    path.write_text(f"<!doctype html><title></title>{frame}{measure}")
    dom, _ = browse(path, "--dump-dom", "--virtual-time-budget=5000")
    bottom, letters = map(int, re.search(r"<title>(\d+) (\d+)</title>", dom).groups())
    assert 0 < bottom <= height
    assert letters >= 9


def test_in_a_browser_it_is_dark_where_the_reader_wants_it(browse, pictures, tmp_path):
    """The mean of the colours that the browser computes for ground and ink."""
    measure = """<script>addEventListener("load", () => {
        document.title = getComputedStyle(document.body).backgroundColor + "; " + getComputedStyle(document.body).color
    })</script>"""
    path = tmp_path / "dark.html"
    # the page's own policy forbids scripts
    path.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", pictures[2]) + measure)
    dom, _ = browse(path, "--dump-dom", "--blink-settings=preferredColorScheme=0")
    colors = re.search(r"<title>(rgb[^;]*); (rgb[^<]*)</title>", dom).groups()
    ground, ink = (sum(map(int, re.findall(r"\d+", color))) / 3 for color in colors)
    assert ground < 50
    assert ink > 200


def test_in_a_browser_it_asks_the_network_for_nothing(browse, pictures, tmp_path):
    """Without its policy too, which forbids it; a page with a foreign picture is caught."""
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", pictures[2])
    assert without != pictures[2]
    foreign = without.replace("</main>", '<img src="http://elsewhere.example/x.png"></main>')
    found = {}
    for name, text in (("whole", pictures[2]), ("without", without), ("foreign", foreign)):
        path = tmp_path / f"{name}.html"
        path.write_text(text)
        found[name] = browse(path, "--dump-dom")[1]
    assert found == {"whole": set(), "without": set(), "foreign": {"elsewhere.example"}}


def test_a_screenshot_on_a_phone_is_not_empty(browse, pictures, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    shot = tmp_path / "phone.png"
    browse(pictures[0] / "run" / "report.html", f"--screenshot={shot}", "--window-size=390,3000")
    pixels = np.asarray(image.open(shot).convert("L"), dtype=np.float64)
    assert pixels.shape == (3000, 390)
    for top in range(0, 3000, 500):
        assert pixels[top : top + 500].std() > 10, f"nothing to see from {top} px on"


def test_the_worst_clients_are_those_of_the_file(pictures):
    """The clients on the page have the accuracies that ClientResults writes, the lowest of all."""
    folder, _, page = pictures
    rows = list(csv.DictReader((folder / "clients.csv").open()))
    worst = re.findall(r"<tr><td>(writer_\d+) \((\w+)\)</td><td>(\d+)</td><td>([\d.]+)</td><td>([\d.]+)</td>", page)
    lowest = sorted(100 * float(row["personalized_accuracy"]) for row in rows)[:3]
    assert [float(shown[4]) for shown in worst] == pytest.approx(lowest, abs=0.051)
    by_name = {row["client"]: row for row in rows}
    for name, population, examples, generalized, _ in worst:
        row = by_name[name]
        assert (row["population"], row["train_examples"]) == (population, examples)
        assert float(generalized) == pytest.approx(100 * float(row["generalized_accuracy"]), abs=0.051)
