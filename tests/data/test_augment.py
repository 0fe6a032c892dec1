import numpy as np
import pytest

from data.augment import augment, generator, is_on, noise_at
from data.settings import DataSettings

RATE = 16_000


@pytest.fixture
def pcm_S():
    return (8000 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.int16)


def test_nothing_is_changed_when_all_is_off(pcm_S):
    settings = DataSettings()
    assert not is_on(settings)
    np.testing.assert_array_equal(augment(pcm_S, settings, generator(0, 0, 0)), pcm_S)


def test_the_result_depends_on_seed_epoch_and_clip_alone(pcm_S):
    settings = DataSettings(augment_speed=0.1, augment_noise=1.0, augment_gain_db=6.0)
    first_S = augment(pcm_S, settings, generator(1, 2, 3))
    np.testing.assert_array_equal(augment(pcm_S, settings, generator(1, 2, 3)), first_S)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        changed_S = augment(pcm_S, settings, generator(*other))
        assert len(changed_S) != len(first_S) or not np.array_equal(changed_S, first_S)


def test_speed_changes_the_length_within_its_bounds_and_never_beyond_30_s(pcm_S):
    settings = DataSettings(augment_speed=0.1)
    lengths = [len(augment(pcm_S, settings, generator(0, 0, index))) for index in range(50)]
    assert RATE / 1.1 - 2 <= min(lengths) < 15_200
    assert 16_900 < max(lengths) <= RATE / 0.9 + 2
    long_S = np.tile(pcm_S, 30)
    assert max(len(augment(long_S, settings, generator(0, 0, index))) for index in range(6)) <= 30 * RATE


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_noise_has_the_asked_power(pcm_S, snr_db):
    wave_S = pcm_S.astype(np.float32) / 32768
    noise_S = noise_at(wave_S, snr_db, generator(0, 0, 0))
    measured = 10 * np.log10(np.mean(wave_S**2) / np.mean(noise_S**2))
    assert measured == pytest.approx(snr_db, abs=0.01)


def test_the_share_of_clips_with_noise(pcm_S):
    settings = DataSettings(augment_noise=0.5)
    noisy = [not np.array_equal(augment(pcm_S, settings, generator(0, 0, index)), pcm_S) for index in range(100)]
    assert 30 < sum(noisy) < 70


def test_gain_keeps_to_its_bounds_and_clips(pcm_S):
    settings = DataSettings(augment_gain_db=6.0)
    peaks = [int(np.abs(augment(pcm_S, settings, generator(0, 0, index))).max()) for index in range(50)]
    assert 8000 / 2.01 < min(peaks) < 5500
    assert 12_000 < max(peaks) < 8000 * 2.01
    loud_S = augment(np.full(400, 30_000, np.int16), DataSettings(augment_gain_db=60.0), generator(0, 0, 1))
    assert loud_S.min() > 0, "clipped, not wrapped round"
