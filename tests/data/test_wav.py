import io

import numpy as np
import pytest
import soundfile as sf

from data.audio import AudioError, decode_for, read_pcm
from data.wav import plain_wav

PCM = np.random.default_rng(5).integers(-3000, 3000, 1600).astype(np.int16)


def wav(pcm=PCM, rate=16_000, subtype="PCM_16"):
    buffer = io.BytesIO()
    sf.write(buffer, pcm, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def test_what_libsndfile_writes_is_read_without_it():
    samples_S = plain_wav(wav())
    assert samples_S.dtype == np.int16
    np.testing.assert_array_equal(samples_S, sf.read(io.BytesIO(wav()), dtype="int16")[0])


@pytest.mark.parametrize(
    "content",
    [
        *(wav(rate=8000), wav(np.stack([PCM, PCM], axis=1)), wav(subtype="PCM_24"), wav(subtype="FLOAT")),
        *(wav()[:-1], wav()[:-2], wav() + b"\0\0", wav()[:800], wav()[:44], wav(PCM[:0]), b"", b"RIFF"),
    ],
)
def test_all_else_is_left_to_libsndfile(content):
    assert plain_wav(content) is None


def test_any_header_byte_that_differs_leaves_the_file_to_libsndfile():
    for place in range(44):
        content = bytearray(wav())
        content[place] ^= 1
        assert plain_wav(content) is None, place


def test_the_samples_are_those_of_the_long_way(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(wav())

    def read():
        info, whole = decode_for(path, 0.02, 0.05)
        assert (info.frames, info.rate, info.channels) == (len(whole), 16_000, 1)
        return [read_pcm(path), read_pcm(path, 0.02, 0.05), whole]

    short = read()
    monkeypatch.setattr("data.audio.plain_wav", lambda content: None)
    for mine, long in zip(short, read(), strict=True):
        np.testing.assert_array_equal(mine, long)


def refusal(path, *span):
    with pytest.raises(AudioError) as error:
        read_pcm(path, *span)
    return error.value.reason, error.value.detail


@pytest.mark.parametrize("span", [(0.2, None), (0.0, 5.0), (0.01, 0.012)])
def test_spans_are_refused_in_the_same_words(tmp_path, monkeypatch, span):
    path = tmp_path / "a.wav"
    path.write_bytes(wav())
    short = refusal(path, *span)
    monkeypatch.setattr("data.audio.plain_wav", lambda content: None)
    assert short == refusal(path, *span)


def test_silence_and_half_a_file_are_refused_as_ever(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(PCM * 0))
    assert refusal(path)[0] == "silent"
    path.write_bytes(wav()[:1000])
    assert refusal(path)[0] == "truncated"
