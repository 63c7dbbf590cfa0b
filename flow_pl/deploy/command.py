"""The command `flow-pl deploy`: write a run as a Flower app, which `flwr run` starts."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from flow_pl import shipped
from flow_pl.cli import FlowCLI, run
from flow_pl.configuration import SECTIONS
from flow_pl.deploy import connection
from flow_pl.engine.privacy import GaussianMechanism
from flow_pl.errors import ConfigurationError, brief
from flow_pl.module import FederatedModule
from flow_pl.utils.arguments import Parser, home
from flow_pl.utils.files import write_text
from flow_pl.utils.optional import import_optional
from flow_pl.version import __version__

PACKAGE = "flow_app"
"""Name of the app's Python package."""

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = {name}
version = {version}
description = {description}
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.42,<2", "flow-pl=={flow_pl}"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = {publisher}
flwr-version-target = {flwr}
fab-format-version = 1
fab-include = ["{package}/*.py", "{package}/*.yaml", "LICENSE"]

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

# what `flwr run --run-config` may change
[tool.flwr.app.config]
{config}
"""

APP = '''\
"""The {side} of the app."""

from pathlib import Path

from flow_pl.deploy.{side}_app import make_{side}_app

app = make_{side}_app(Path(__file__).with_name("config.yaml"))
'''


class _Read(FlowCLI):
    """Creates everything that a run needs, without running it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def deploy(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the arguments after `flow-pl deploy`.

    Raises:
        ConfigurationError: the configuration cannot be used or deployed, flwr is not installed, or the folder is in
            use or has a name that Flower refuses; or with --check, see `connection.command`.
    """
    if any(word.partition("=")[0] == "--check" for word in args):
        connection.command(args)
        return
    parser = Parser(
        prog="flow-pl deploy",
        description="Write a run as a Flower app: its clients are SuperNodes, each with its own data, and "
        "`flwr run` starts it.",
        epilog="Options of a run, such as --trainer.max_epochs=3 or --model.method.alpha=0.5, can be added. "
        "`flow-pl deploy --check HOST:PORT` tests a node's connection, see `flow-pl deploy --check --help`.",
    )
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        required=True,
        metavar="NAME",
        help="configuration of the run, or each of its files",
    )
    parser.add_argument("--out", required=True, type=home, metavar="FOLDER", help="output folder of the app")
    parser.add_argument("--publisher", default="local", help="publisher of the app in Flower (default: local)")
    parser.add_argument(
        "--license",
        type=home,
        metavar="FILE",
        help="licence of the app, a text file (default: all rights reserved by the publisher)",
    )
    options, overrides = parser.parse_known_args(args)
    licence = RESERVED.format(publisher=options.publisher) if options.license is None else _licence(options.license)
    flwr = import_optional("flwr", "flower", "the Flower app").__version__
    from flow_pl.deploy.server_app import RUN_CONFIG

    files = [str(shipped.find(name)) for name in options.config]
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    cli = run(["fit", *(f"--config={file}" for file in files), *overrides], _Read)
    check_deployable(cli)
    settings = json.loads(cli._parser("fit").dump(cli.config["fit"], skip_none=False, format="json"))
    settings = {key: value for key, value in settings.items() if key in SECTIONS}
    folder: Path = options.out
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} already exists and is not empty: choose another folder with --out.")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,31}", folder.resolve().name):
        raise ConfigurationError(
            f"the folder's name is {folder.resolve().name!r}, but Flower takes an app only from a folder whose name "
            "starts with a letter and has at most 32 letters, digits and hyphens: choose another one with --out."
        )
    root = str(settings["trainer"].get("default_root_dir") or "runs")
    write_app(folder, settings, app_name(root), options.publisher, licence, flwr, {**RUN_CONFIG, "folder": root})
    print(
        f"{folder}: a Flower app, {cli.model.identity()['method']} with flow_pl {__version__} on flwr {flwr}. "
        f"Start it by `flwr run {folder} SUPERLINK --stream`, see docs/deploy.md."
    )


def write_app(
    folder: Path,
    settings: dict[str, Any],
    name: str,
    publisher: str,
    licence: str,
    flwr: str,
    run_config: dict[str, Any],
) -> None:
    """Write the files of an app.

    Args:
        folder: folder of the app.
        settings: configuration of the run.
        name: name of the app.
        publisher: publisher of the app.
        licence: text of its licence.
        flwr: target version of Flower.
        run_config: settings that `flwr run --run-config` may change.
    """
    package = folder / PACKAGE
    try:
        package.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be created ({error}): choose another folder with --out.") from error
    config = yaml.safe_dump(settings, sort_keys=False)
    write_text(package / "__init__.py", '"""A run of flow_pl as a Flower app."""\n')
    for side in ("server", "client"):
        write_text(package / f"{side}_app.py", APP.format(side=side))
    write_text(package / "config.yaml", f"# Made by `flow-pl deploy`; the configuration of the run.\n{config}")
    write_text(folder / "LICENSE", licence)
    text = PYPROJECT.format(
        name=_toml(name),
        version=_toml("1.0.0"),
        description=_toml("A run of flow_pl as a Flower app"),
        publisher=_toml(publisher),
        flow_pl=__version__,
        flwr=_toml(flwr),
        package=PACKAGE,
        config="\n".join(f"{key} = {_toml(value)}" for key, value in run_config.items()),
    )
    write_text(folder / "pyproject.toml", text)


def app_name(root: str) -> str:
    """Return the name of an app: the end of the run's folder, as Flower takes it.

    A name in Flower starts with a letter, and has at most 32 letters, digits and hyphens.

    Args:
        root: folder of the run.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(Path(root).parts[-2:])).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}"
    return name[:32].strip("-")


def _toml(value: Any) -> str:
    """Return a text, number or truth value as TOML, which JSON's are without its escapes of Unicode."""
    return json.dumps(value, ensure_ascii=False)


RESERVED = """\
All rights reserved by {publisher}. No licence is granted to copy, change or distribute this app.
"""
"""Default licence, since only the publisher can grant one. Flower refuses an app without a licence file."""


def _licence(path: Path) -> str:
    """Read a licence.

    Raises:
        ConfigurationError: the file cannot be read, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the licence {path} cannot be read ({brief(error)}): give --license a text file."
        ) from error
    if not text.strip():
        raise ConfigurationError(f"the licence {path} is empty: give --license a file with its text.")
    return text


def check_deployable(cli: FlowCLI) -> None:
    """Refuse settings that only simulate, tasks that cannot be scored, and privacy that nodes could undo.

    Raises:
        ConfigurationError: the run has such a setting.
    """
    model, data = cli.model, cli.datamodule
    assert isinstance(model, FederatedModule)
    if model.objective.real_valued:
        raise ConfigurationError(
            f"model.objective is {type(model.objective).__name__}, which cannot be deployed, as its labels are real "
            "values and nodes report counts of right predictions: deploy a task with classes, or simulate this run "
            "with `flow-pl fit`."
        )
    reasons = {
        "model.attack": (model.attack, "attackers are simulated"),
        "model.compression": (model.compression, "tensors are sent uncompressed"),
    }
    for name, (value, why) in reasons.items():
        if value is not None:
            raise ConfigurationError(
                f"{name} is {type(value).__name__}, which cannot be deployed, as {why}: leave it out."
            )
    if not data.availability.all_arrive:
        raise ConfigurationError(
            "data.dropout or data.deadline is set, which simulates failing nodes: leave them out; real failures are "
            "detected, and the app's round-timeout is the deadline."
        )
    if str(cli.trainer.precision) != "32-true":
        raise ConfigurationError(
            f"trainer.precision is {cli.trainer.precision}, which cannot be deployed, as nodes compute in float32: "
            "leave it out."
        )
    if model.privacy is not None:
        check_private_deployment(model.privacy, data.sampling)


def check_private_deployment(privacy: GaussianMechanism, sampling: str) -> None:
    """Check that a deployed run is private.

    Nodes come and go, and receive the run's seed. So each client must be drawn independently, and neither noise nor
    cohorts may follow from the seed.

    Raises:
        ConfigurationError: it is not.
    """
    if sampling != "poisson" or sampling not in privacy.samplings:
        raise ConfigurationError(
            f"data.sampling is {sampling} and model.privacy {type(privacy).__name__}, expected poisson and "
            "GaussianMechanism in deployment: as nodes come and go, only independent draws have a known probability."
        )
    if not privacy.secure:
        raise ConfigurationError(
            "model.privacy.secure is false, so the noise follows from the run's seed, which every node receives: set "
            "it to true."
        )
    if privacy.simulated:
        raise ConfigurationError(
            "model.privacy.noise_cohort_size or population is set, which simulates another deployment: leave them out; "
            "the app's registered-clients is the number of clients that may take part."
        )
