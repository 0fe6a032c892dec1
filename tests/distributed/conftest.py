import pytest

from tests.distributed.launching import launch


@pytest.fixture
def run_ranks(tmp_path):
    """run_ranks(world_size, "checks_x:name", ...): the checks in real gloo processes; the output shows what failed."""
    return lambda world_size, *checks: launch(world_size, tmp_path, *checks)
