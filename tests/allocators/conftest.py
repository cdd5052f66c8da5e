"""A tiny model that all tests of allocators read."""

import pytest

from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny llama on disk; read only."""
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))
