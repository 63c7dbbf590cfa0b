"""Errors a user can mend: bad input, configuration or files.

The command line prints the message alone and exits with status 1; everything else keeps its traceback.
"""

from __future__ import annotations


class FlowError(ValueError):
    """Base of the errors whose message is all a user needs."""


class ConfigurationError(FlowError):
    """A setting that cannot work: names the value, what was expected and the remedy."""


class DataError(FlowError):
    """Data that cannot be used: names the file or client, what was found and the remedy."""


def brief(value: object) -> str:
    """What an error of a library or a file says, as a part of a message: one line, no control characters, not long.

    Args:
        value: the error, or a text or a list of names from a file.

    Returns:
        At most 300 characters.
    """
    said = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value) or type(value).__name__
    line = " ".join("".join(c if c.isprintable() else " " for c in said[:1000]).split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def find_cause(error: BaseException, *kinds: type[Exception]) -> BaseException | None:
    """The error of some kind that another one was raised from, as jsonargparse wraps what a constructor raises.

    Args:
        error: what was caught.
        *kinds: what is looked for.

    Returns:
        The first of these kinds in the chain that begins with `error`; None where there is none.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kinds):
        cause = cause.__cause__ or cause.__context__
    return cause
