"""What a command shows of warnings."""

import warnings

from flow_pl.module import RejectedClientWarning
from flow_pl.utils.exit_messages import exit_with_message


def test_a_warning_of_this_package_is_one_line(capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with exit_with_message():
            warnings.warn("client 'a' is left out.", RejectedClientWarning, stacklevel=1)
            warnings.warn("something else.", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: client 'a' is left out.\n"
    assert [str(each.message) for each in caught] == ["something else."]  # shown as Python does
