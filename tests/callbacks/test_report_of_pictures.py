"""The page on a run on pictures: what it has, and looked at in a browser."""

import csv
import html
import re
import shutil
import socketserver
import subprocess
import threading

import numpy as np
import pytest

from tests.callbacks.test_routing_report import backbone, figure_names, reported

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def digits():
    data = {"class_path": "DigitsData", "init_args": {"num_clients": 8, "cohort_size": 3, "new_client_fraction": 0.25}}
    return {"data": data}


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_page_refers_to_nothing_but_itself(pictures):
    references = re.findall(r'(?:src|href|action|data|poster|srcset)\s*=\s*"([^"]*)"', pictures[2])
    assert len(references) > 10
    assert all(reference.startswith(("data:image/png;", "#")) for reference in references)
    assert not re.search(r"url\(|@import|<script|<link|<iframe|https?://", pictures[2])


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


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_in_a_browser_it_fits_its_window_and_shows_its_pictures(browse, pictures, tmp_path, width):
    window, content, shown = widths(browse, tmp_path, pictures[2], width)
    assert window == width
    assert content <= width
    assert shown == pictures[2].count("<img ")
    wider = pictures[2].replace("</main>", f'<div style="width:{width + 100}px">wide</div></main>')
    assert widths(browse, tmp_path, wider, width)[1] > width, "this test can fail"


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_screenshot_on_a_phone_is_not_empty(browse, pictures, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    shot = tmp_path / "phone.png"
    browse(pictures[0] / "run" / "report.html", f"--screenshot={shot}", "--window-size=390,3000")
    pixels = np.asarray(image.open(shot).convert("L"), dtype=np.float64)
    assert pixels.shape == (3000, 390)
    for top in range(0, 3000, 500):
        assert pixels[top : top + 500].std() > 10, f"nothing to see from {top} px on"


@pytest.mark.slow
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
