import io
import json
import tracemalloc

import pytest

from flow_pl.data.readers.json_stream import JsonStream

TEXT = {"a": [1, -2.5e-3, True, None, 'x\\u00e9"y\n'], "long": {"k": ["z" * 50] * 3}, "": {}, "n": 12345}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 1000])
@pytest.mark.parametrize("indent", [None, 2])
def test_values_are_those_of_the_json_module_wherever_the_text_is_cut(chunk, indent):
    stream = JsonStream(io.StringIO(json.dumps(TEXT, indent=indent)), chunk)
    found = {name: stream.value() for name in stream.members()}
    stream.end()
    assert found == TEXT


def test_objects_can_be_walked_through():
    stream = JsonStream(io.StringIO('{"a": {"b": 1, "c": {}}, "d": 2}'), 4)
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
    ["", "{", '{"a"', '{"a":', '{"a": tr', '{"a": [1, 2', '{"a": "x', '{"a": 1,', "[1]", '{"a": x}', '{"a": 1} 2'],
)
@pytest.mark.parametrize("chunk", [1, 1000])
def test_damage_is_found(text, chunk):
    def walk(stream):
        for _ in stream.members():
            stream.value()
        stream.end()

    with pytest.raises(json.JSONDecodeError):
        walk(JsonStream(io.StringIO(text), chunk))


class Endless(io.TextIOBase):
    """An object with a member of 1,000 characters after the other, 20,000 in all."""

    def __init__(self):
        self.left = 20_000

    def read(self, size=-1):
        self.left, first = self.left - 1, self.left == 20_000
        if self.left < 0:
            return ""
        return ("{" if first else "") + f'"k": "{"v" * 990}"' + ("," if self.left else "}")


def test_memory_does_not_grow_with_the_text():
    stream = JsonStream(Endless(), 1000)
    tracemalloc.start()
    count = sum(len(stream.value()) == 990 for _ in stream.members())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 100_000
