import io
import json
import tracemalloc

import pytest

from flow_pl.data.readers.json_stream import JsonStream

TEXT = {"a": [1, -2.5e-3, True, None, 'x\\u00e9"y\n'], "long": {"k": ["z" * 50] * 3}, "": {}, "n": 12345}


def walk(stream):
    for _ in stream.members():
        stream.value()
    stream.end()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 1000])
@pytest.mark.parametrize("indent", [None, 2])
def test_values_are_those_of_the_json_module_wherever_the_text_is_cut(chunk, indent):
    stream = JsonStream(io.BytesIO(json.dumps(TEXT, indent=indent).encode()), chunk)
    found = {name: stream.value() for name in stream.members()}
    stream.end()
    assert found == TEXT


def test_objects_can_be_walked_through():
    stream = JsonStream(io.BytesIO(b'{"a": {"b": 1, "c": {}}, "d": 2}'), 4)
    found = []
    for outer in stream.members():
        if outer == "a":
            for inner in stream.members():
                found.append((inner, stream.value()))
        else:
            found.append((outer, stream.value()))
    assert found == [("b", 1), ("c", {}), ("d", 2)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a"',
        '{"a":',
        '{"a": tr',
        '{"a": [1, 2',
        '{"a": "x',
        '{"a": 1,',
        "[1]",
        '{"a": x}',
        '{"a": 1} 2',
        '{"a": NaN}',
        '{"a": [-Infinity]}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": 01}',
        '{"a": "x\ny"}',
        '{"a": ' + "[" * 300 + "]" * 300 + "}",
        "\ufeff",
        "\ufeff\ufeff{}",
    ],
)
@pytest.mark.parametrize("chunk", [1, 1000])
def test_damage_is_found(text, chunk):
    with pytest.raises(ValueError, match=r"\w"):
        walk(JsonStream(io.BytesIO(text.encode()), chunk))


class Endless(io.BufferedIOBase):
    """An object with a member of 1,000 characters after the other, 20,000 in all."""

    def __init__(self):
        self.left = 20_000

    def read(self, size=-1):
        self.left, first = self.left - 1, self.left == 20_000
        if self.left < 0:
            return b""
        text = ("{" if first else "") + f'"k": "{"v" * 990}"' + ("," if self.left else "}")
        return text.encode()


def test_memory_does_not_grow_with_the_text():
    stream = JsonStream(Endless(), 1000)
    tracemalloc.start()
    count = sum(len(stream.value()) == 990 for _ in stream.members())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 100_000


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
def test_a_byte_order_mark_is_no_part_of_the_text(chunk):
    stream = JsonStream(io.BytesIO(b'\xef\xbb\xbf{"a": 1}'), chunk)
    assert {name: stream.value() for name in stream.members()} == {"a": 1}
    stream.end()


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 12, 1000])
def test_half_of_a_surrogate_pair_is_refused_and_nothing_that_looks_like_one(chunk):
    whole = {"\U0001f600": "x\\ud800 \\\\ud83d\U0001f600\U0001f600\\", "b": "\ue000\uffff"}
    stream = JsonStream(io.BytesIO(json.dumps(whole).encode()), chunk)
    assert {name: stream.value() for name in stream.members()} == whole
    stream.end()
    for half in ("\ud800", "\udc00", "\ud83dx", "\\\ud83d", "\ud83d\ud83d\ude00"):
        stream = JsonStream(io.BytesIO(json.dumps({"a": half}).encode()), chunk)
        with pytest.raises(ValueError, match=r"surrogate pair|decode byte 0xed"):
            walk(stream)


def test_nan_and_infinity_are_named_in_the_refusal():
    for literal in (b"NaN", b"Infinity", b"-Infinity"):
        stream = JsonStream(io.BytesIO(b'{"a": [' + literal + b"]}"))
        with pytest.raises(ValueError, match="JSON has no NaN and no Infinity"):
            walk(stream)
