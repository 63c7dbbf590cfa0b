import gzip

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from flow_pl.data import ArrayData
from flow_pl.errors import DataError

ROWS = [
    ("client", "y", "left", "right"),
    ("007", "oak", "0.5", "1"),
    ("7", "ash", "1.5", "2"),
    ("007", "", "-2.5", "3"),
]
EXPECTED = {"007": ([[0.5, 1], [-2.5, 3]], [1, -1]), "7": ([[1.5, 2]], [0])}


def text(delimiter=",", rows=ROWS, end="\n", quote="", decimal="."):
    lines = [[cell.replace(".", decimal) for cell in row] for row in rows]
    return "".join(delimiter.join(f"{quote}{cell}{quote}" for cell in line) + end for line in lines)


def read(path, **settings):
    return {name: (x.tolist(), y.tolist()) for name, x, y, *_ in ArrayData(str(path), **settings).clients()}


@pytest.mark.parametrize(
    "content",
    [
        text(),
        text("\t"),
        text(";"),
        text("|"),
        text(";", decimal=","),
        text("\t", decimal=","),
        text(end="\r\n"),
        text(end="\r"),
        text(quote='"'),
        "\n" + text(),
        text().rstrip("\n"),
        text().replace("client,y,left,right", "client, y , left,right"),
        text(end=",\n"),
        text(rows=[("", *ROWS[0]), *(("5", *row) for row in ROWS[1:])]),
        text(rows=[("Unnamed: 0", *ROWS[0]), *(("5", *row) for row in ROWS[1:])]),
        text(rows=[("level_0", *ROWS[0]), *((str(i), *row) for i, row in enumerate(ROWS[1:]))]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_dialects_and_encodings(tmp_path, content, encoding):
    (tmp_path / "a.csv").write_bytes(content.encode(encoding))
    assert read(tmp_path / "a.csv") == EXPECTED


def test_packed_files_and_other_endings(tmp_path):
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write(text())
    (tmp_path / "A.TSV").write_text(text("\t"))
    assert read(tmp_path / "a.csv.gz") == EXPECTED
    assert read(tmp_path / "A.TSV") == EXPECTED


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["0", "1", ""], [0, 1, -1]),
        (["0.0", "1.0", "-1"], [0, 1, -1]),
        (["true", "false", "true"], [1, 0, 1]),
        (["NA", "", "SE"], [0, -1, 1]),
    ],
)
def test_labels(tmp_path, labels, expected):
    rows = [("client", "y", "left"), *(("a", label, "1") for label in labels)]
    (tmp_path / "a.csv").write_text(text(rows=rows))
    assert read(tmp_path / "a.csv")["a"][1] == expected


def test_truth_values_and_whole_numbers_are_numbers(tmp_path):
    """A type that shows in the last of many rows is the column's."""
    rows = [("y", "client", "n", "b")] + [("0", "a", "3", "true")] * 30_000 + [("1", "a", "2.5", "false")]
    (tmp_path / "a.csv").write_text(text(rows=rows))
    x, y = read(tmp_path / "a.csv")["a"]
    assert x[-2:] == [[3, 1], [2.5, 0]]
    assert np.sum(y) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a.csv is empty: write a header"),
        ("\n\n", r"a.csv is empty: write a header"),
        ("client,y,left\n", r"a.csv has a header but no rows"),
        ("client,y,left,left\na,0,1,2\n", r"a.csv has the column 'left' more than once: rename it"),
        ("a,0,1\nb,1,2\n", r"a.csv has no 'client' and no 'y', only 'a', '0', '1': name the right ones"),
        ("client,y\na,0\n", r"a.csv has no column for features beside 'client' and 'y'"),
        ("client,y,left\na,0,1\nb,1\n", r"a.csv cannot be read \(.*Expected 3 columns, got 2.*\): write it anew"),
        ("client,y,left\na,0,1\nb,1,?\n", r"'left' has type object \('\?' in row 1\): encode it as numbers"),
        ("client,y,left\na,0,1\nb,1,\n", r"'left' has no value \(NaN or null\) in row 1: fill it in"),
        ("client,y,left\na,0,1\nb,1,nan\n", r"'left' has no value \(NaN or null\) in row 1"),
        ("client,y,left\na,0,1\nb,1,-inf\n", r"'left' has -inf, in row 1"),
        ("client,y,left\na,0,1\nb,1,1e300\n", r"'left' has 1e\+300, larger than the largest float32"),
        ("client,y,left\na,0,1\n,1,2\n", r"column 'client' has rows without a client, the first is row 1: give"),
        ("client,y,left\na,0.5,1\nb,1,2\n", r"'y' has the label 0.5 in row 0, expected whole numbers"),
        ("client,y,left\na,2020-01-01,1\n", r"'y' has .*expected whole numbers"),
        (b"client,y,left\nJos\xe9,0,1\n", r"a.csv is not UTF-8 in line 2 .*: save it as UTF-8"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv")


def test_a_damaged_packed_file(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text().encode())[:-9])
    with pytest.raises(DataError, match=r"a.csv.gz cannot be read .*: get it again"):
        read(tmp_path / "a.csv.gz")
