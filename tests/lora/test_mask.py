"""Masks computed from a seed: the chance, independence of places, repetition, and the published generator's numbers."""

import pytest
import torch

from lora.mask import draw_seed, keep_mask, keep_scale, threshold


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_chance_and_scale(dropout):
    keep = keep_mask(torch.tensor([5]), 2000, 100, dropout).float()
    assert keep.mean() == pytest.approx(1 - dropout, abs=0.004)
    assert (keep.mean(0) - 1 + dropout).abs().max() < 0.06  # no column of its own kind
    assert (keep.mean(1) - 1 + dropout).abs().max() < 0.3
    assert keep_scale(dropout) == pytest.approx(1 / (1 - dropout), rel=1e-4)
    assert keep_scale(dropout) * (1 - threshold(dropout) / 65536) == 1.0


def test_neighbours_are_independent():
    keep = keep_mask(torch.tensor([1 << 40]), 4000, 64, 0.5).double() - 0.5
    correlation = keep.T @ keep / 4000 * 4 - torch.eye(64, dtype=torch.float64)
    assert correlation.abs().max() < 0.09
    lagged = (keep[1:] * keep[:-1]).mean(0) * 4
    assert lagged.abs().max() < 0.07


def test_an_element_depends_on_its_place_and_the_whole_seed():
    keep = keep_mask(torch.tensor([3]), 40, 30, 0.5)
    assert torch.equal(keep, keep_mask(torch.tensor([3]), 99, 61, 0.5)[:40, :30])
    for other in (4, 3 + (1 << 35)):
        assert not torch.equal(keep, keep_mask(torch.tensor([other]), 40, 30, 0.5))


def philox(counter, key, num_rounds):
    """The generator as its paper states it, in Python's own integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(num_rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def test_bits_are_those_of_philox():
    # A known answer of ten rounds, from the authors' own test vectors.
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones,) * 2, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    low, high = 0xDEADBEEF, 0x1234567
    keep = keep_mask(torch.tensor([high << 32 | low]), 3, 24, 0.3)
    for row in range(3):
        for group in range(3):
            w = philox((group, row, 0, 0), (low, high), 7)
            numbers = [half for i in (0, 2, 1, 3) for half in (w[i] & 0xFFFF, w[i] >> 16)]
            assert keep[row, group * 8 : group * 8 + 8].tolist() == [n >= threshold(0.3) for n in numbers]


def test_seeds_follow_torchs_generator():
    torch.manual_seed(1)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(1)
    assert torch.equal(draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)
