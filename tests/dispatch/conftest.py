"""The tests of dispatch have the tiles that users have."""

import pytest

from tests import few_sizes


@pytest.fixture(scope="package", autouse=True)
def all_sizes():
    few_sizes.use(few_sizes.fit)
    yield
    few_sizes.use(few_sizes.few)
