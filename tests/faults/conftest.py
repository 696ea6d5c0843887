"""Fixtures for the tests that try to make the cache lie."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# `faultkit` is imported by the processes that the tests start, too, so it needs a name.
sys.path.insert(0, str(Path(__file__).parent))

import faultkit

from keras_remote_airflow.testing import StorageServer


@pytest.fixture
def server() -> Iterator[StorageServer]:
    """A server that, like one on which we have objectCreator and objectViewer only, refuses
    overwrites, deletes and reads of the bucket itself: whatever passes here needs no more."""
    with StorageServer(buckets=[faultkit.BUCKET]) as server:
        server.deny("overwrite", "delete", "update", "bucket_get", "bucket_create")
        yield server


@pytest.fixture
def client(server: StorageServer) -> Any:
    return faultkit.client_for(server.url)
