"""Errors a user can mend: bad input, configuration or files.

The command line prints the message alone and exits with status 1; everything else keeps its traceback.
"""


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


def require_positive(**values: float) -> None:
    """Check that every value is greater than zero.

    Args:
        **values: settings by name.

    Raises:
        ConfigurationError: a value is zero or negative.
    """
    for name, value in values.items():
        if not value > 0:
            raise ConfigurationError(f"{name} is {value}, expected a number greater than 0.")


def require_at_least_zero(**values: float) -> None:
    """Check that no value is negative.

    Args:
        **values: settings by name.

    Raises:
        ConfigurationError: a value is negative.
    """
    for name, value in values.items():
        if not value >= 0:
            raise ConfigurationError(f"{name} is {value}, expected 0 or more.")


def require_fraction(**values: float) -> None:
    """Check that every value lies in [0, 1).

    Args:
        **values: settings by name.

    Raises:
        ConfigurationError: a value is negative, 1 or more.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigurationError(f"{name} is {value}, expected a share of at least 0 and less than 1.")
