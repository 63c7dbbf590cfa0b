"""Instances that are one tensor, or a mapping of several."""

import pytest
import torch

from flow_pl.utils.inputs import described, first, from_leaves, in_order, leaves, map_inputs, names_of, take, zip_inputs

ONE = torch.arange(6).view(3, 2)
TWO = {"b": torch.arange(3), "a": torch.ones(3, 4)}


def test_one_tensor_is_treated_as_a_function_treats_it():
    assert torch.equal(take(ONE, 1), ONE[1])
    assert torch.equal(map_inputs(torch.neg, ONE), -ONE)
    assert torch.equal(zip_inputs(torch.add, ONE, ONE), 2 * ONE)
    assert first(ONE) is ONE is in_order(ONE)
    assert (leaves(ONE), names_of(ONE)) == ([ONE], None)
    assert from_leaves(None, [ONE]) is ONE
    assert described(ONE) == "[2] (torch.int64)"


def test_a_mapping_is_treated_tensor_by_tensor():
    assert take(TWO, (slice(2), None))["a"].shape == (2, 1, 4)
    assert map_inputs(len, TWO) == {"b": 3, "a": 3}
    # by name, in the order of the first
    summed = zip_inputs(torch.add, TWO, dict(reversed(TWO.items())))
    assert list(summed) == ["b", "a"]
    assert torch.equal(summed["b"], 2 * TWO["b"])
    assert first(TWO) is TWO["b"]
    assert list(in_order(TWO)) == ["a", "b"]
    again = from_leaves(names_of(TWO), leaves(TWO))
    assert again.keys() == TWO.keys()
    assert all(again[name] is t for name, t in TWO.items())
    assert described(TWO) == "b [] (torch.int64), a [4] (torch.float32)"


def test_mappings_of_other_names_do_not_go_together():
    with pytest.raises(KeyError):
        zip_inputs(torch.add, TWO, {"b": TWO["b"]})
    with pytest.raises(ValueError, match="zip"):
        from_leaves(("a",), [ONE, ONE])
