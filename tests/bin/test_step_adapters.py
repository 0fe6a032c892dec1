"""Adapters and temperature of several ranks are those of one on the same global batch: gradients, and after steps."""

import math
from pathlib import Path

import pytest
import torch

from distributed.atomic import read_tensors
from tests.bin.ranks_adapters import WORLD_SIZES
from tests.bin.ranks_step import SETTINGS
from tests.distributed.launching import launch

RANKS = WORLD_SIZES[1:]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    launch(1, folder, "tests.bin.ranks_adapters:adapters_at_all_world_sizes")
    return folder


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("world_size", RANKS)
def test_gradients_temperature_and_adapters_equal_one_rank(
    written: Path, world_size: int, dtype: torch.dtype, most: float, flat: bool
) -> None:
    expected = read_tensors(written / f"1 {dtype} {flat} 0.safetensors")
    gradients = {name: value for name, value in expected.items() if name.startswith("gradient of ")}
    assert {"gradient of log_inv_temperature", "gradient of audio_head.weight"} <= gradients.keys()
    assert sum("lora_A" in name for name in gradients) == 6  # q, k, v of a layer in each tower
    whole_norm = torch.cat([value.flatten() for value in gradients.values()]).norm()
    for rank in range(world_size):
        found = read_tensors(written / f"{world_size} {dtype} {flat} {rank}.safetensors")
        assert found.keys() == expected.keys()
        apart = torch.cat([(found[name] - value).flatten() for name, value in gradients.items()]).norm()
        assert apart <= most * whole_norm
        for name, value in expected.items():
            assert value.dtype == dtype
            difference, largest = float((found[name] - value).abs().max()), float(value.abs().max())
            if name in gradients:
                assert largest > 1e-5, f"{name} is zero in the reference: its comparison says nothing"
                assert difference <= 5 * most * largest, name  # a tensor whose terms nearly cancel out rounds more
            else:
                assert difference <= most, name


def test_the_steps_train_and_the_two_updates_agree(written: Path) -> None:
    """What is compared has moved by far more than it may differ."""
    flat, plain = (read_tensors(written / f"1 torch.float64 {flat} 0.safetensors") for flat in (True, False))
    assert abs(float(flat["log_inv_temperature"]) + math.log(SETTINGS.temperature)) > 1e-4
    for name, value in flat.items():
        assert float((plain[name] - value).abs().max()) < 1e-12, name
