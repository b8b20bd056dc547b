"""What seams of the fast path are given."""

import pytest

from wan_loader.fastpath.tally import Tally
from wan_loader.system.leases import Leases


@pytest.fixture
def tally():
    return Tally()


@pytest.fixture
def leases():
    return Leases()
