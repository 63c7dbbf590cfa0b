"""Text of tables."""

from flow_pl.utils.files import csv_text


def test_rows_below_one_header():
    rows = [{"a": 1, "b": "x, y"}, {"c": float("nan"), "a": float("inf")}, {"b": None}]
    assert csv_text(rows) == 'a,b,c\n1,"x, y",\ninf,,\n,,\n'
