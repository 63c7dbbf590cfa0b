"""The commands `flow-pl export` and `flow-pl personalize`: write a trained model to a file that needs no flow_pl."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flow_pl.checks import check_fit
from flow_pl.data import FederatedDataModule
from flow_pl.data.readers.npz import npz_arrays
from flow_pl.errors import ConfigurationError, DataError, brief
from flow_pl.export import FORMATS, check_format, export_model
from flow_pl.module import FederatedModule
from flow_pl.serving import RunFormat, ServedModel, ServerModel, load, load_format, load_kept, personalize
from flow_pl.utils.arguments import Parser, home
from flow_pl.utils.inputs import Inputs, map_inputs, take
from flow_pl.utils.words import no_such_option

DESCRIPTIONS = {
    "export": "Write the server's model, or that of a client of the run's data, to a file that needs no flow_pl.",
    "personalize": "Personalize the server's model on a client's own examples and write it to a file that needs no "
    "flow_pl. The training data is not needed.",
}


def command(args: Sequence[str], name: str) -> None:
    """Run a command.

    Args:
        args: the arguments after its name.
        name: "export" or "personalize".

    Raises:
        ConfigurationError: an option is invalid, or the model cannot be written in this format.
        DataError: the client's data cannot be used.
    """
    parser = _make_parser(name)
    options, overrides = parser.parse_known_args(args)
    before = ""
    for word in overrides:
        value_of_option = before.startswith("--") and "=" not in before and not word.startswith("--")
        if not (word.startswith(("--model.", "--data.")) or value_of_option):
            raise ConfigurationError(no_such_option(word.partition("=")[0], parser.options(), parser.prog))
        before = "" if value_of_option else word
    check_format(options.format)
    _check_folder(options.out)
    arrays = _read(options.data, ("y",)) if name == "personalize" else {}
    module, data = load(options.config, options.ckpt_path, *overrides)
    stored = load_format(options.ckpt_path)
    make = _personalized if name == "personalize" else _exported
    model, example = make(options, arrays, module, data, stored)
    export_model(model, options.out, example, options.format, options.max_batch)
    size = options.out.stat().st_size
    takes = map_inputs(lambda t: f"[batch, {', '.join(map(str, t.shape[1:]))}] of {t.dtype}", example)
    named = ", ".join(f"{key} {each}" for key, each in takes.items()) if isinstance(takes, dict) else takes
    print(f"{options.out}: {options.format}, {size:,} bytes; takes {named}.")
    if stored.class_names:
        print(f"Classes in the order of the outputs: {', '.join(stored.class_names)}.")


export = partial(command, name="export")
"""`flow-pl export`."""

personalize_client = partial(command, name="personalize")
"""`flow-pl personalize`."""


def _make_parser(name: str) -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=f"flow-pl {name}",
        description=DESCRIPTIONS[name],
        epilog="Options of a run for --model and --data, such as --model.method.routing=hard, can be added.",
    )
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        required=True,
        metavar="NAME",
        help="configuration of the run, or each of its files",
    )
    parser.add_argument("--ckpt_path", required=True, type=home, metavar="FILE", help="checkpoint of the run")
    if name == "personalize":
        parser.add_argument(
            "--data",
            required=True,
            type=home,
            metavar="FILE",
            help=".npz file with the client's examples x, in the format of the run's data, and their labels y "
            "(names of classes if the run has them; -1 or an empty text: none)",
        )
        parser.add_argument("--kept", metavar="NAME", help="client of the run whose state is used")
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the examples' order (default: 0)")
    else:
        parser.add_argument(
            "--client", metavar="NAME", help="client of the run's data to personalize for (default: the server's model)"
        )
        parser.add_argument(
            "--example",
            type=home,
            metavar="FILE",
            help=".npz file with examples x, for the shape of the server model's input (default: the run's data)",
        )
    parser.add_argument("--out", required=True, type=home, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--format", default="torch_export", help=f"{', '.join(FORMATS)} (default: torch_export)", metavar="FORMAT"
    )
    parser.add_argument("--max_batch", type=int, metavar="N", help="largest batch (default: any; executorch: 16)")
    return parser


def _check_folder(out: Path) -> None:
    """Check before any computation that the file can be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{out.parent} cannot be created ({error}): choose another folder with --out."
        ) from error
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigurationError(f"{out} cannot be written to: give --out a file in a writable folder.")


def _read(path: Path, others: tuple[str, ...]) -> dict[str, Any]:
    """Read a `.npz` file: the features `x`, or in its absence all arrays except `y` and the others; and the others."""
    names = ("x", *others)
    if not path.is_file():
        raise DataError(f"there is no file {path}: write one with numpy.savez, with arrays {' and '.join(names)}.")
    stored, found = npz_arrays(path, lambda name: True)
    arrays: dict[str, Any] = dict(found)
    if "x" not in arrays:
        named = {name: array for name, array in arrays.items() if name not in ("y", *others)}
        arrays = {name: arrays[name] for name in others if name in arrays} | ({"x": named} if named else {})
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DataError(f"{path} has no {' and no '.join(missing)}, only {brief(stored)}: name its arrays so.")
    return arrays


def _personalized(
    options: argparse.Namespace,
    arrays: dict[str, Any],
    module: FederatedModule,
    data: FederatedDataModule,
    stored: RunFormat,
) -> tuple[ServedModel, Inputs]:
    """Return the model of the client whose examples were given."""
    kept = None if options.kept is None else load_kept(module, options.ckpt_path, options.kept)
    with _naming(options.data):
        x, y = map_inputs(data.transform, stored.inputs(arrays["x"])), stored.labels(arrays["y"])
        return personalize(module, x, y, options.seed, kept), take(x, slice(1))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors of its arrays."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _exported(
    options: argparse.Namespace,
    arrays: dict[str, Any],
    module: FederatedModule,
    data: FederatedDataModule,
    stored: RunFormat,
) -> tuple[ServedModel, Inputs]:
    """Return the server's model, or that of a client of the run's data."""
    if options.client is None and options.example is not None:
        given = _read(options.example, ())["x"]
        with _naming(options.example):
            x = take(map_inputs(data.transform, stored.inputs(given)), slice(1))
        check_fit(module.method, x, 1, real_valued=module.objective.real_valued)
        return ServerModel(module), x
    data.prepare_data()
    data.setup()
    if options.client is None:
        return ServerModel(module), data.example()
    clients = range(len(data.federation.store))
    client = next((client for client in clients if data.client_name(client) == options.client), None)
    if client is None:
        some = ", ".join(repr(data.client_name(client)) for client in clients[:3])
        raise DataError(f"--client is {options.client!r}, which is not among the run's clients ({some}, ...).")
    kept = None
    if module.method.private:
        try:
            kept = load_kept(module, options.ckpt_path, options.client)
        except DataError:
            print(f"client {options.client!r} has not been sampled: it starts from the server's model.")
    x, y = data.examples(client, "train")
    return personalize(module, x, y, kept=kept), take(x, slice(1))
