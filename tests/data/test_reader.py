import numpy as np
import pytest
import soundfile as sf

import data.reader
from data.audio import AudioError, read_pcm
from data.reader import AudioReader


@pytest.fixture
def decodes(monkeypatch):
    seen = []
    real = data.reader.decode_for
    monkeypatch.setattr(data.reader, "decode_for", lambda path, *span: (seen.append(path), real(path, *span))[1])
    return seen


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_the_same_samples_cached_or_not(tmp_path, rate):
    path = str(tmp_path / "a.ogg")
    sf.write(path, np.random.default_rng(0).standard_normal(3 * rate) * 0.1, rate)
    plain, cached = AudioReader(cache_mb=0), AudioReader(cache_mb=10)
    for span in ((0.3, 1.1), (1.0, 2.9), (0.3, 1.1)):
        expected_S = read_pcm(path, *span)
        np.testing.assert_array_equal(plain.read(path, *span), expected_S)
        np.testing.assert_array_equal(cached.read(path, *span), expected_S)


def test_a_file_is_decoded_once_for_all_its_chunks(wav, decodes):
    reader = AudioReader(cache_mb=10)
    path = str(wav("a.wav", seconds=2.0))
    for start_s in (0.0, 0.5, 1.0):
        reader.read(path, start_s, start_s + 0.5)
    assert decodes == [path]


def test_the_least_recently_used_file_goes_first_and_the_limit_holds(wav, decodes):
    paths = [str(wav(f"{name}.wav", seconds=12.0)) for name in "abc"]  # 0.384 MB each decoded
    reader = AudioReader(cache_mb=1)
    for index in (0, 1, 0, 2, 0, 1):
        reader.read(paths[index], 0.0, 1.0)
    assert [path[-5] for path in decodes] == ["a", "b", "c", "b"]
    assert reader.num_bytes <= 1_000_000


def test_spans_are_checked_the_same_cached_or_not(wav):
    path = str(wav("a.wav", seconds=40.0))
    reader = AudioReader(cache_mb=10)
    reader.read(path, 0.0, 1.0)
    for span, reason in (((0.0, 35.0), "too_long"), ((41.0, 42.0), "outside_file"), ((None, None), "too_long")):
        with pytest.raises(AudioError) as caught:
            reader.read(path, *span)
        assert caught.value.reason == reason


def test_callers_cannot_change_what_is_cached(wav):
    reader = AudioReader(cache_mb=10)
    pcm_S = reader.read(str(wav("a.wav")))
    with pytest.raises(ValueError, match="read-only"):
        pcm_S[0] = 1
