"""Parse Lightning's command line: help on one page, errors in one line, values as sweep agents write them."""

from __future__ import annotations

import argparse
import enum
import os
import sys
import textwrap
from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from flow_pl.errors import brief
from flow_pl.utils.refusals import class_names, explain
from flow_pl.utils.words import no_such_option, nulls

UNRECOGNIZED = "unrecognized arguments: "
NO_VALUE = ": expected one argument"
NO_YAML = "Problems parsing config: "
OPTIONS = ("-c", "--config")


class FlowParser(LightningArgumentParser):
    """Lightning's parser, with a one-page `--help` and one-line errors.

    Args:
        roots: classes whose arguments the settings are, by the first part of their option names.
        choices: class names that the page lists for a setting of the model whose type does not tell them.
        add_help: whether to add `--help`; `--help all` shows every setting.
        **kwargs: arguments of `LightningArgumentParser`.
    """

    def __init__(
        self,
        roots: Mapping[str, type] = MappingProxyType({}),
        choices: Mapping[str, Sequence[str]] = MappingProxyType({}),
        add_help: bool = True,
        **kwargs: Any,
    ) -> None:
        # an abbreviation may become ambiguous when an option is added
        super().__init__(add_help=False, allow_abbrev=False, **kwargs)
        self.roots = roots
        self.choices = choices
        if add_help:
            self.add_argument("-h", "--help", action=HelpPage, help="show this help; `--help all`: every setting")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any
    ) -> Any:
        """Parse as jsonargparse does, after `nulls`."""
        return super().parse_args(nulls(sys.argv[1:] if args is None else args), *rest, **kwargs)

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """Dump as jsonargparse does, also if a text's default is an enumeration, as for some Lightning settings."""
        try:
            text: str = super().dump(cfg, *args, **kwargs)
        except ValueError:
            text = super().dump(_plain(cfg), *args, **kwargs)
        return text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with a one-line message and status 2."""
        if not self.exit_on_error:
            super().error(message, ex)  # for the calling parser
        command = self.prog.replace(" [options]", "")
        words = list(getattr(self, "args", None) or [])
        command += f" {words[0]}" if command == "flow-pl" and words and not words[0].startswith("-") else ""
        if message.startswith(UNRECOGNIZED):
            option = message.removeprefix(UNRECOGNIZED).split()[0].partition("=")[0]
            message = no_such_option(option, self._option_string_actions, command)
        elif message.endswith(NO_VALUE):
            option = _without_value(words, message.removeprefix("argument ").removesuffix(NO_VALUE))
            message = f"{option} needs a value. `{command} --help` lists the options."
        elif message.startswith(NO_YAML):
            why = brief(message.removeprefix(NO_YAML).replace('"<unicode string>", ', ""))
            message = f"{_broken_file(words)} is not valid YAML: {why}."
        else:
            message = explain(message, command, self.roots)
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)


class HelpPage(argparse._HelpAction):
    """`--help` prints one page, `--help all` jsonargparse's help on every setting."""

    def __init__(self, option_strings: Sequence[str], dest: str = argparse.SUPPRESS, help: str | None = None) -> None:  # noqa: A002 (argparse's name)
        super().__init__(option_strings, dest=dest, help=help)
        self.nargs, self.metavar = "?", "all"

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print the help and exit."""
        if values not in (None, "all"):
            parser.error(f"{option_string} is {values}, expected nothing or all.")
        sections = {action.dest.partition(".")[0] for action in parser._actions}
        if values == "all" or "trainer" not in sections:
            parser.print_help()
        else:
            print(help_page(parser, parser.roots, parser.choices))
        parser.exit()


def help_page(parser: argparse.ArgumentParser, roots: Mapping[str, type], choices: Mapping[str, Sequence[str]]) -> str:
    """Return a page on the options of a Lightning command, with the choices of classes but not their settings.

    Args:
        parser: parser of the command.
        roots: see `FlowParser`.
        choices: see `FlowParser`.
    """
    command = parser.prog.replace(" [options]", "")
    own: dict[str, list[str]] = {name: [] for name in ("", *roots)}
    for action in parser._actions:
        section, _, name = action.dest.partition(".")
        listed = action.option_strings and not name.endswith("help") and action.dest not in roots
        if listed and not any(option.endswith(".help") for option in action.option_strings):
            own[section if section in roots and name else ""].append(name or action.option_strings[-1])
    pages = [
        f"usage: {command} [-c CONFIG ...] [--OPTION VALUE ...]",
        parser.description or "",
        _table(
            {
                "-c, --config NAME": "a file, or one of the configurations that `flow-pl configs` lists; later "
                "ones override earlier ones, options override both",
                "--print_config": "print the resulting configuration in full and exit",
                **{option: OWN.get(option, "") for option in own[""] if option not in LISTED},
            }
        ),
        "data, --data CLASS and --data.SETTING VALUE:\n" + _wrapped(class_names(roots["data"])),
        "model, --model.NAME:\n"
        + _table({name: ", ".join(choices.get(name) or class_names(roots["model"], name)) for name in own["model"]}),
        "trainer, Lightning's Trainer, --trainer.NAME VALUE:\n" + _wrapped(own["trainer"]),
        "Settings of a class, and of everything:\n"
        + _table(
            {
                f"{command} --model.method.help Flow": "settings of a class, here of a method",
                f"{command} --data.help ArrayData": "",
                f"{command} --trainer.callbacks.help RoutingReport": "",
                f"{command} --help all": "every setting, its type and default",
            }
        ),
    ]
    return "\n\n".join(page for page in pages if page)


LISTED = ("--help", "--config", "--print_config")

OWN = {
    "--seed_everything": "seed of the run (default 0)",
    "--ckpt_path": "checkpoint to start from; `last` resumes the run in its folder",
    "--weights_only": "Lightning's; checkpoints are always loaded without running code",
    "--verbose": "whether Lightning prints its own table of metrics",
    "--return_predictions": "whether predictions are kept in memory as well",
}
"""Help for the options that belong to no section."""


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows)) + 2
    lines: list[str] = []
    for name, text in rows.items():
        first, *more = textwrap.wrap(text, 98 - width) or [""]
        lines += [f"  {name:{width}}{first}".rstrip(), *(" " * (width + 2) + line for line in more)]
    return "\n".join(lines)


def _wrapped(names: Sequence[str]) -> str:
    return textwrap.fill(", ".join(names), 98, initial_indent="  ", subsequent_indent="  ")


def _plain(settings: Any) -> Any:
    """Return a copy in which string enumerations are replaced by their values."""
    if isinstance(settings, Namespace):
        return Namespace({name: _plain(value) for name, value in vars(settings).items()})  # type: ignore[no-untyped-call]
    if isinstance(settings, Mapping):
        return {name: _plain(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return type(settings)(_plain(value) for value in settings)
    return str(settings.value) if isinstance(settings, str) and isinstance(settings, enum.Enum) else settings


def _without_value(words: Sequence[str], option: str) -> str:
    """Return the option, or setting of it, that lacks a value."""
    ends = [word for word, after in zip(words, [*words[1:], "--"], strict=True) if after.startswith("-")]
    forms = option.split("/")
    meant = (word for word in ends if word in forms or word.startswith(f"{option}."))
    return next(meant, option)


def _broken_file(words: Sequence[str]) -> str:
    """Return the path of the configuration that is not valid YAML."""
    for option, value in zip(["", *words], words, strict=False):
        path = value if option in OPTIONS else value.partition("=")[2] if value.partition("=")[0] in OPTIONS else ""
        try:
            yaml.safe_load(Path(path).read_text(encoding="utf-8") if path else "")
        except (OSError, ValueError, yaml.YAMLError):
            return path
    return "the configuration"


def expand_home(settings: Any) -> Any:
    """Expand a leading `~` in every text to the home folder, in place.

    Args:
        settings: namespaces, mappings, lists and values.

    Returns:
        The settings.
    """
    if isinstance(settings, Namespace):
        settings.__dict__.update({name: expand_home(value) for name, value in settings.__dict__.items()})
    elif isinstance(settings, MutableMapping):
        settings.update({name: expand_home(value) for name, value in settings.items()})
    elif isinstance(settings, MutableSequence):
        settings[:] = [expand_home(value) for value in settings]
    elif isinstance(settings, str) and settings.startswith("~"):
        return os.path.expanduser(settings)
    return settings
