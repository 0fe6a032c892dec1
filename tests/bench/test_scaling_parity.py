from pathlib import Path

import pytest
import torch

from bench import scaling_parity
from bench.ours import Shapes, Training, build, wake_adapters
from bench.scaling_parity import (
    OBJECTIVE,
    against_one_rank,
    batch_of_rank,
    check_at_full_size,
    check_small,
    compare,
    fp32_gradients,
    summed_gradients,
)
from distributed.atomic import read_tensors
from distributed.processes import World

ALONE = World(0, 1, 0, torch.device("cpu"), "none", 0)
PAIR = World(0, 2, 0, torch.device("cpu"), "gloo", 0)
TINY = Shapes.of(tiny=True)


def test_one_rank_keeps_what_it_finds_for_the_others(tmp_path: Path) -> None:
    checks = check_small(ALONE, tmp_path)
    kinds = ["plain", "flat", "after 4 steps", "after 4 steps, their way"]
    assert [(check["check"], check["difference"]) for check in checks] == [(f"fp32, {kind}", 0.0) for kind in kinds]
    kept = read_tensors(tmp_path / "fp32, flat.safetensors")
    assert {"log_inv_temperature", "audio_head.weight"} <= kept.keys()
    found = against_one_rank(tmp_path, "fp32, flat", PAIR, {name: 1.01 * value for name, value in kept.items()})
    assert found["difference"] == pytest.approx(0.01, rel=1e-3)
    assert found["within_a_tensor"] == pytest.approx(0.01, rel=1e-3)
    assert found["temperature"] == pytest.approx(0.01, rel=1e-3)
    assert found["cosine"] == pytest.approx(1.0)
    assert against_one_rank(tmp_path, "never kept", PAIR, kept) == {}


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"^a is zero: its comparison says nothing"):
        compare({"a": torch.ones(2)}, {"a": torch.zeros(2)})
    with pytest.raises(AssertionError, match="b"):
        compare({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)})


def test_the_gradient_in_fp32_is_of_the_same_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Equal where the model is in fp32 already; nearby where it is in bf16; left out where there is no room."""
    free = 2**40
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    monkeypatch.setattr(scaling_parity, "CHECKED_CLIPS_AT_FULL_SIZE", 6)
    fed = batch_of_rank(TINY, ALONE, 6, seed=2)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        built = build(TINY, ALONE.device, compute_dtype=dtype)
        wake_adapters(built.model.eval())
        ours = summed_gradients(Training(built, OBJECTIVE, True, "off"), fed)
        exact = fp32_gradients(TINY, built, fed)
        assert exact is not None
        found = compare(ours, exact)
        if dtype == torch.float32:
            assert found["difference"] == 0.0
        else:
            assert 1e-7 < 1 - found["cosine"] < 0.01
            lines = check_at_full_size(ALONE, tmp_path, TINY, built, None)
            kinds = ["bf16, flat", scaling_parity.TO_FP32, "bf16, one rank in 2 passes", "bf16, one rank in 4 passes"]
            assert [line["check"] for line in lines][:4] == kinds
            assert lines[1]["cosine"] == pytest.approx(found["cosine"], abs=1e-6)
            assert all(line["cosine"] > 0.99 for line in lines[2:4])
    free = 2**10
    assert fp32_gradients(TINY, built, fed) is None
