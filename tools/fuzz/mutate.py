"""Damage files at random, as transfers, disks and attackers do."""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile

import numpy as np

EXTREMES = (0, 1, -1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, -(2**63))
"""Numbers at which something may overflow."""

JSON_PIECES = (
    *("null", "true", "{}", "[]", '""', "-1", "1.5", "1e999", "-1e999", "NaN", "-Infinity", "3.0", "1e300"),
    *("9" * 30, "9" * 5000, "[" * 3000, "[" * 200_000, '{"a":' * 20_000, '"\\ud800"', '"\\u0000"', '"x" * 3', "\ufeff"),
    *('{"x": [], "y": []}', '[{"a": [1]}]', '["a", 1, null]', '"user_data"', '"users"', '"' + "n" * 3000 + '"'),
)
"""JSON values to put where something else is expected."""


def damaged(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """Damage a file in one to three places.

    Args:
        content: content of an intact file.
        other: content of another file, whose bytes may be inserted.
        random: generator of the damage.

    Returns:
        The damaged content.
    """
    for _ in range(random.integers(1, 4)):
        kind = DAMAGES[random.integers(len(DAMAGES))]
        content = kind(content, other, random) if content else other[:16]
    return content


def damaged_json(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """Replace, double or remove a token of a JSON text."""
    text = content.decode("utf-8")
    tokens = [match.span() for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[-+.\w]+|[\[\]{},:]', text)]
    for _ in range(random.integers(1, 4)):
        start, stop = tokens[random.integers(len(tokens))]
        piece = JSON_PIECES[random.integers(len(JSON_PIECES))]
        text = text[:start] + (piece, text[start:stop] * 2, "")[random.integers(3)] + text[stop:]
    return text.encode("utf-8", errors="surrogatepass")


def damaged_value(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """Replace some values of a JSON text, which stays valid."""
    root = json.loads(content)
    for _ in range(random.integers(1, 3)):
        node = root
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = keys[random.integers(len(keys))]
            if not (isinstance(node[key], dict | list) and node[key]) or random.random() < 0.2:
                break
            node = node[key]
        node[key] = (
            *(None, True, [], {}, "", "x", "\ud800", -1, 1.5, 2**31, 2**70, float("inf"), float("nan"), 1e300),
            *([node[key]], {"x": node[key]}, [1, "a"], "n" * 3000, node[next(iter(keys))]),
        )[random.integers(19)]
        if not root:
            break
    return json.dumps(root).encode()


def damaged_gzip(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """Damage the content of a gzip file, which stays valid."""
    inner = (damaged, damaged_json, damaged_value, damaged_value)[random.integers(4)]
    return gzip.compress(inner(gzip.decompress(content), gzip.decompress(other), random), 1, mtime=0)


def damaged_npz(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """Damage arrays of a valid `.npz` file: a header, the content, or a member replaced by something else."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = list(members)[random.integers(len(members))]
    swapped = members[list(members)[random.integers(len(members))]]
    header = members[name][:128].decode("latin1")
    shape = str(tuple(int(value) for value in random.choice(EXTREMES[:-1], random.integers(0, 4))))
    kind = ("'O'", "'<U0'", "'|S0'", "'<f8'", "'<U9'", "'|V4'", "'<M8[s]'", "'<c16'", "[('a', '<i4')]", "None")
    members[name] = (
        lambda: damaged(members[name], swapped, random),
        lambda: damaged(members[name][:128], swapped, random) + members[name][128:],
        lambda: swapped,
        lambda: re.sub(r"\([\d, ]*\)", shape, header).encode("latin1") + members[name][128:],
        lambda: (
            re.sub(r"'descr': '[^']*'", f"'descr': {kind[random.integers(len(kind))]}", header).encode("latin1")
            + members[name][128:]
        ),
        lambda: json.dumps(header).encode(),
    )[random.integers(6)]()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[random.integers(2)]) as file:
        for member, values in members.items():
            file.writestr(member, values)
    return packed.getvalue()


def _flip_bits(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for at in random.integers(len(content), size=random.integers(1, 9)):
        changed[at] ^= 1 << random.integers(8)
    return bytes(changed)


def _set_bytes(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for at in random.integers(len(content), size=random.integers(1, 9)):
        changed[at] = (0, 255, 127, 128, random.integers(256))[random.integers(5)]
    return bytes(changed)


def _set_number(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    width = int(random.choice([2, 4, 8]))
    number = EXTREMES[random.integers(len(EXTREMES))] % 2 ** (8 * width)
    at = int(random.integers(len(content)))
    return content[:at] + number.to_bytes(width, "little") + content[at + width :]


def _truncate(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    return content[: random.integers(len(content))]


def _delete_slice(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    start, stop = _slice(content, random)
    return content[:start] + content[stop:]


def _double_slice(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    start, stop = _slice(content, random)
    return content[:stop] + content[start:]


def _splice(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    start, stop = _slice(other, random)
    at = int(random.integers(len(content)))
    kept = at + (stop - start) * int(random.integers(2))
    return content[:at] + other[start:stop] + content[kept:]


def _zero_slice(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    start, stop = _slice(content, random)
    return content[:start] + bytes(stop - start) + content[stop:]


def _slice(content: bytes, random: np.random.Generator) -> tuple[int, int]:
    start = int(random.integers(len(content)))
    longest = (8, 64, 1024, len(content))[random.integers(4)]
    return start, start + int(random.integers(1, longest + 1))


DAMAGES = (
    _flip_bits,
    _flip_bits,
    _set_bytes,
    _set_number,
    _set_number,
    _truncate,
    _delete_slice,
    _double_slice,
    _splice,
    _zero_slice,
)
