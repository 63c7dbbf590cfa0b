"""Parse the commands that are not Lightning's; report a mistake in one line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from flow_pl.utils.words import nearest, no_such_option

REQUIRED = "the following arguments are required: "
CHOICE = re.compile(r"argument (?P<name>.+): invalid choice: '?(?P<value>[^']*)'? \(choose from (?P<choices>.+)\)")
TYPE = re.compile(r"argument (?P<name>.+): invalid (?P<kind>\w+) value: '?(?P<value>[^']*)'?")
NO_VALUE = re.compile(r"argument (?P<name>.+): expected .*argument.*")

KINDS = {"int": "a whole number", "float": "a number"}


def home(text: str) -> Path:
    """Return a path with `~` expanded to the home folder."""
    return Path(text).expanduser()


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors that suggest the nearest known name.

    Options must be written in full, since an abbreviation may become ambiguous when an option is added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.words: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does, and keep the words for error messages."""
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self.words, namespace)

    def options(self) -> list[str]:
        """Return the known options."""
        return [option for option in self._option_string_actions if option.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Exit with a one-line message and status 2."""
        sys.stderr.write(f"error: {self._explain(message)}\n")
        raise SystemExit(2)

    def _explain(self, message: str) -> str:
        where = f"`{self.prog} --help` lists"
        choice, kind, no_value = CHOICE.fullmatch(message), TYPE.fullmatch(message), NO_VALUE.fullmatch(message)
        if message.startswith(REQUIRED):
            missing = message.removeprefix(REQUIRED)
            typo = next((word for word in self._unknown() if nearest(word, missing.split(", "))), None)
            if typo is not None:
                return no_such_option(typo, missing.split(", "), self.prog)
            return f"{self.prog} needs {missing}. {where} the options."
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
            return no_such_option(word, self.options(), self.prog)
        if choice is not None:
            choices = [each.strip("'") for each in choice["choices"].split(", ")]
            if choice["name"] == "command":
                return f"there is no {self.prog} {choice['value']}.{nearest(choice['value'], choices)} {where} them."
            expected = " or ".join(choices)
            return f"{choice['name']} is {choice['value']}, expected {expected}."
        if kind is not None:
            return f"{kind['name']} is {kind['value'] or 'empty'}, expected {KINDS.get(kind['kind'], 'another value')}."
        if no_value is not None:
            return f"{no_value['name']} needs a value. {where} the options."
        return message

    def _unknown(self) -> list[str]:
        """Return the words that look like options but are unknown."""
        words = [word.partition("=")[0] for word in self.words]
        return [word for word in words if word.startswith("--") and word not in self._option_string_actions]
