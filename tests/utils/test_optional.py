"""What to install for a package that is missing."""

import importlib.metadata

import pytest

from flow_pl.errors import ConfigurationError
from flow_pl.utils.optional import import_optional, install_command

DECLARED = [
    "torch>=2.10",
    'datasets>=4.0; extra == "datasets"',
    'flwr-datasets>=0.6.1; python_version >= "3.99" and extra == "datasets"',
    'flwr<2,>=1.42; python_version >= "3.99" and extra == "flower"',
    'h5py>=3.12.1; python_version >= "3.2" and extra == "hdf5"',
]


@pytest.fixture(autouse=True)
def declared(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: DECLARED)


def test_the_packages_of_a_group_are_named():
    assert install_command("hdf5") == 'pip install "h5py>=3.12.1" (the extra hdf5 of flow-pl)'


def test_a_newer_python_is_asked_for_where_a_package_needs_it():
    assert install_command("flower") == "flwr requires Python 3.99 or newer (the extra flower of flow-pl)"
    assert install_command("datasets") == (
        'pip install "datasets>=4.0"; flwr-datasets requires Python 3.99 or newer (the extra datasets of flow-pl)'
    )


def test_an_unknown_group_is_left_to_the_project():
    assert install_command("unheard") == 'pip install ".[unheard]" in the folder of the project'


def test_the_message_has_module_user_and_command():
    with pytest.raises(ConfigurationError, match=r"^the app needs no_such_package \(.*\): pip install \"h5py>=3"):
        import_optional("no_such_package.part", "hdf5", "the app")
