"""The contract of an `ObjectStore` (tests/core/test_store.py), kept by real Cloud Storage."""

import inspect
from collections.abc import Iterator

import pytest

from keras_remote_airflow.core.cloud.bucket import open_bucket

from ..core import test_store as contract
from .conftest import Place
from .prefixed_store import PrefixedStore

file = contract.file
store = contract.store


@pytest.fixture
def subject(place: Place) -> Iterator[contract.Subject]:
    with open_bucket(place.bucket, user_project=place.user_project) as store:
        prefix = f"{place.namespace}/"
        yield contract.Subject(
            PrefixedStore(store, prefix),
            lambda name: place.view.blob(prefix + name).delete(),
            lambda name, content: place.view.blob(prefix + name).upload_from_string(content),
        )


# The tests that know no more than the contract; the others look at the local server's requests.
_KNOWN = {"store", "subject", "file", "tmp_path", "name", "size", "change"}
for _name, _test in vars(contract).items():
    if _name.startswith("test_"):
        _parameters = set(inspect.signature(_test).parameters)
        if _parameters <= _KNOWN and _parameters & {"store", "subject"}:
            globals()[_name] = _test
