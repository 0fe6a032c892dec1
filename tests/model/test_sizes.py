"""Size classes: they hold what they are made for, waste little, and are few."""

import random

import pytest

from model.sizes import SizeClass, rounded_up


def draw(rng: random.Random, num: int, longest: int) -> list[int]:
    return [rng.randint(1, longest) for _ in range(num)]


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("longest", [1, 3, 9, 80, 1500])
def test_a_class_is_filled_by_dummies_within_its_bounds(longest: int, pool: int) -> None:
    rng = random.Random(longest)
    for num in (1, 2, 7, 16, 300):
        lengths = draw(rng, num, longest)
        size = SizeClass.of(lengths, 16, 1500, pool)
        pooled = [max(1, length // pool) for length in lengths]
        filled, filled_pooled = size.filled(lengths), size.filled_pooled(pooled)
        assert filled[:num] == lengths
        assert filled_pooled[:num] == pooled
        assert len(filled) == len(filled_pooled) == size.num_sequences
        assert (sum(filled), sum(filled_pooled)) == (size.num_tokens, size.num_pooled)
        assert max(filled) <= size.max_len <= 1500
        assert max(filled_pooled) <= size.max_pooled
        assert sum(filled) > sum(lengths), "there is a dummy token"
        assert sum(size.filled([])) == size.num_tokens
        assert size.num_slots % 2 == 0


def test_sizes_are_16_an_octave_then_32_and_the_longest_is_a_power_of_two_up_to_the_limit() -> None:
    assert len({rounded_up(n) for n in range(2049, 4097)}) == 16
    assert len({rounded_up(n) for n in range(4097, 8193)}) == 32
    assert [rounded_up(n) for n in (1, 16, 17, 300, 8192, 8193)] == [16, 16, 32, 304, 8192, 8448]
    assert SizeClass.of([5, 90], 64, 1500).max_len == 128
    assert SizeClass.of([5], 64, 1500).max_len == 64
    assert SizeClass.of([1400], 64, 1500).max_len == 1500


@pytest.mark.parametrize(("num", "low", "high", "shortest"), [(16, 50, 110, 64), (256, 50, 110, 64), (600, 1, 16, 16)])
def test_batches_of_a_kind_share_few_classes_and_waste_little(num: int, low: int, high: int, shortest: int) -> None:
    """Clips of a second or two, and strings of a few tokens."""
    rng = random.Random(0)
    batches = [[rng.randint(low, high) for _ in range(num)] for _ in range(400)]
    sizes = [SizeClass.of(lengths, shortest, 1500, 2) for lengths in batches]
    waste = sum(s.num_tokens for s in sizes) / sum(map(sum, batches)) - 1
    assert waste < 0.04
    assert len(set(sizes)) <= 12
    assert all(len(lengths) < s.num_sequences < 4 * len(lengths) for s, lengths in zip(sizes, batches, strict=True))
