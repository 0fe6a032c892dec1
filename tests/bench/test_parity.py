"""Our towers and transformers' on one tiny checkpoint, and that the comparison can tell when they differ."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.parity import Agreement, compare, masked_mean, measure, our_features
from bench.random_checkpoint import write_checkpoint

STRINGS = ["call forwarding", "press one", "the line is busy now", "mailbox", "voicemail password"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of the same shape and different weights; published and new key names."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, layout in enumerate(("v4", "v5")):
        write_checkpoint(folder / layout, "tiny", layout, seed=seed, device="cpu")
    return [folder / "v4", folder / "v5"]


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    """More than one batch of noisy tones of different lengths, int16."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(9):
        time_S = np.arange(round(16_000 * (0.3 + 0.13 * i))) / 16_000
        wave_S = 0.2 * np.sin(2 * np.pi * (200 + 150 * i) * time_S) + rng.normal(0, 0.01, len(time_S))
        found.append((wave_S * 32767).astype(np.int16))
    return found


@pytest.mark.parametrize("which", [0, 1])
def test_towers_agree_with_transformers(which, checkpoints, waves):
    measured = measure(checkpoints[which], waves, STRINGS, CPU)
    assert measured["is_good"]
    assert measured["agreements"].keys() == {"tower", "lm", "text"}
    for name, found in measured["agreements"].items():
        assert found.num_inputs == found.num_nearest_is_own == (5 if name == "text" else 9)
        assert found.min_cosine > 1 - 1e-6
        assert found.min_centred_cosine > 1 - 1e-5
        assert found.mean_unlike_cosine < 0.999
        assert "ok" in found.line(name)


def test_other_weights_are_seen(checkpoints, waves):
    first, second = (our_features(folder, waves, STRINGS, CPU)[0] for folder in checkpoints)
    for name in first:
        assert not compare(first[name], second[name]).is_good
    assert "BELOW" in compare(first["text"], second["text"]).line("text")


def test_compare_sees_what_a_common_direction_hides():
    """One large vector plus a little of their own: plain cosines stay near 1 even when the own parts are swapped."""
    torch.manual_seed(0)
    own_ND = torch.randn(6, 32)
    features_ND = 100.0 + own_ND
    same = compare(features_ND, features_ND)
    assert same.min_cosine == pytest.approx(1.0)
    assert same.num_nearest_is_own == 6
    swapped = compare(features_ND, features_ND.roll(1, 0))
    assert swapped.min_cosine > 0.999
    assert swapped.mean_centred_cosine < 0.5
    assert swapped.num_nearest_is_own == 0
    assert swapped.mean_unlike_cosine > 0.999


def test_compare_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"ours are \(2, 3\), theirs \(2, 4\)"):
        compare(torch.zeros(2, 3), torch.zeros(2, 4))


def test_masked_mean_leaves_padding_out():
    x_BLD = torch.tensor([[[1.0], [3.0], [99.0]], [[2.0], [99.0], [99.0]]])
    mask_BL = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(x_BLD, mask_BL).tolist() == [[2.0], [2.0]]


def test_below_the_target_is_not_good():
    assert Agreement(2, 0.9991, 0.9999, 0.9, 0.9, 0.5, 2).is_good
    assert not Agreement(2, 0.9989, 0.9999, 0.9, 0.9, 0.5, 2).is_good
