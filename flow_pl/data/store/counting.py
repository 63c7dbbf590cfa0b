"""Count the vocabularies of a data set once, and store them in a file."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from flow_pl.data.encodings.encoding import Encoding, VocabularySource
from flow_pl.data.encodings.vocabulary import Vocabulary, most_frequent, read_tokens
from flow_pl.data.readers.sources import RawClient
from flow_pl.data.store.cache import progress
from flow_pl.errors import ConfigurationError, DataError, brief


def kept_vocabularies(
    path: Path, encoding: Encoding, clients: Callable[[], Iterable[RawClient]]
) -> dict[str, Vocabulary]:
    """Return the vocabularies of an encoding from a file, which is written if missing.

    Args:
        path: the file.
        encoding: the encoding.
        clients: yields the clients whose tokens count, one at a time.

    Returns:
        The vocabularies by name.

    Raises:
        DataError: a client's examples do not suit the encoding, or a vocabulary is empty or damaged.
        ConfigurationError: the file cannot be written.
    """
    wanted = encoding.vocabularies()
    if not wanted:
        return {}
    if not path.exists():
        _write(path, _find(encoding, wanted, clients))
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {name: Vocabulary(stored[name]) for name in wanted}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is no usable vocabulary ({brief(error)}): delete it, it will be rebuilt.") from error


def _find(
    encoding: Encoding, wanted: dict[str, VocabularySource], clients: Callable[[], Iterable[RawClient]]
) -> dict[str, list[str]]:
    counts: dict[str, Counter[str]] = {}
    files = "the settings of the encoding"
    if any(source.is_counted for source in wanted.values()):
        counts, files = _count(encoding, clients())
    tokens = {}
    for name, source in wanted.items():
        if source.path:
            tokens[name] = read_tokens(Path(source.path), source.size)
        else:
            tokens[name] = list(source.characters or most_frequent(counts.get(name, Counter()), source.size))
        try:
            Vocabulary(tokens[name])  # an empty vocabulary is never written
        except DataError as error:
            raise DataError(f"{source.path or files}: {error}") from error
    return tokens


def _count(encoding: Encoding, clients: Iterable[RawClient]) -> tuple[dict[str, Counter[str]], str]:
    """Count the tokens of each vocabulary; also return the source files, for messages."""
    counts: dict[str, Counter[str]] = {}
    files: dict[str, None] = {}
    for client in progress(clients, "Counting tokens"):
        files[client.source] = None
        try:
            for name, tokens in encoding.tokens(client.columns):
                counts.setdefault(name, Counter()).update(tokens)
        except DataError as error:
            raise DataError(f"{client.source}: client {client.name!r} {error}") from error
    return counts, ", ".join(files) or "the training part"


def _write(path: Path, tokens: dict[str, list[str]]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(tokens), encoding="utf-8")
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigurationError(
            f"the vocabulary {path} cannot be written ({brief(error)}): set cache_dir, or the environment variable "
            "FLOW_PL_CACHE, to a writable folder on a disk with free space."
        ) from error
