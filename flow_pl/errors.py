"""Errors that a user can correct: bad input, configuration or files.

The command line prints only the message and exits with status 1; all other errors keep their traceback.
"""

from __future__ import annotations


class FlowError(ValueError):
    """Base class of errors whose message is all a user needs."""


class ConfigurationError(FlowError):
    """A setting that cannot work: names the value, what was expected and the remedy."""


class DataError(FlowError):
    """Data that cannot be used: names the file or client, what was found and the remedy."""


def brief(value: object) -> str:
    """Shorten the message of a library's error, or a file's content, to one line without control characters.

    Args:
        value: the error, or a text or a list of names from a file.

    Returns:
        At most 300 characters.
    """
    said = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value) or type(value).__name__
    line = " ".join("".join(c if c.isprintable() else " " for c in said[:1000]).split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def find_cause(error: BaseException, *kinds: type[Exception]) -> BaseException | None:
    """Find an error of some kind in the chain of causes, since jsonargparse wraps errors of constructors.

    Args:
        error: the caught error.
        *kinds: the classes to find.

    Returns:
        The first such error in the chain that starts with `error`; None if there is none.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kinds):
        cause = cause.__cause__ or cause.__context__
    return cause
