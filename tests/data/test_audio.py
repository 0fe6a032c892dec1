"""Each way in which a file is not what it says, as a named reason."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from data.audio import MIN_RATE, SAMPLE_RATE, AudioError, iterate_pcm, probe, read_bytes, read_pcm

RATE = 16_000


def tone(seconds=0.5, rate=RATE):
    return (0.3 * np.sin(2 * np.pi * 440.0 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def reason_of(path, *span, read=read_pcm):
    with pytest.raises(AudioError) as caught:
        read(path, *span)
    assert str(caught.value).startswith(caught.value.reason + ": ")
    return caught.value.reason


def wav_header(rate=RATE, channels=1, data_bytes=3200, bits=16):
    frame = channels * bits // 8
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * frame, frame, bits)
    return b"RIFF" + struct.pack("<I", 36 + data_bytes) + b"WAVE" + form + b"data" + struct.pack("<I", data_bytes)


# ---------------------------------------------------------------- what is read


def test_sixteen_bit_wav_comes_back_sample_for_sample(tmp_path):
    pcm_S = np.random.default_rng(0).integers(-32768, 32768, 8000, dtype=np.int16)
    sf.write(tmp_path / "a.wav", pcm_S, RATE)
    np.testing.assert_array_equal(read_pcm(tmp_path / "a.wav"), pcm_S)
    np.testing.assert_array_equal(read_pcm(tmp_path / "a.wav", 0.1, 0.25), pcm_S[1600:4000])


def test_a_span_of_a_long_file_equals_the_cut_of_it(tmp_path):
    pcm_S = np.random.default_rng(0).integers(-3000, 3000, 125 * RATE, dtype=np.int16)
    sf.write(tmp_path / "long.flac", pcm_S, RATE)  # over WHOLE_FILE_S: read by seeking
    np.testing.assert_array_equal(
        read_pcm(tmp_path / "long.flac", 100.0, 101.5), pcm_S[100 * RATE : 100 * RATE + 24000]
    )


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_other_rates_are_resampled(tmp_path, rate):
    sf.write(tmp_path / "a.wav", tone(1.0, rate), rate)
    pcm_S = read_pcm(tmp_path / "a.wav")
    assert pcm_S.dtype == np.int16
    assert len(pcm_S) == SAMPLE_RATE
    middle = slice(4000, 12000)
    np.testing.assert_allclose(pcm_S[middle] / 32768, tone(1.0)[middle], atol=2e-3)


def test_channels_are_averaged(tmp_path):
    sf.write(tmp_path / "a.wav", np.stack([tone(), np.zeros_like(tone())], axis=1), RATE)
    np.testing.assert_allclose(read_pcm(tmp_path / "a.wav") / 32768, tone() / 2, atol=1e-4)


def test_float_files_beyond_full_scale_are_clipped_not_wrapped(tmp_path):
    sf.write(tmp_path / "a.wav", tone() * 10, RATE, subtype="FLOAT")
    assert read_pcm(tmp_path / "a.wav").max() == 32767


@pytest.mark.parametrize(
    ("fmt", "subtype"), [("OGG", "VORBIS"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")]
)
def test_compressed_formats_are_read(tmp_path, fmt, subtype):
    sf.write(tmp_path / "a", tone(1.0), RATE, format=fmt, subtype=subtype)
    assert len(read_pcm(tmp_path / "a", 0.2, 0.7)) == 8000


# ---------------------------------------------------------------- files that are none


def test_missing_empty_folder_and_links_in_a_circle(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    assert reason_of(tmp_path / "none.wav") == "missing"
    assert reason_of(tmp_path / "empty.wav") == "empty_file"
    assert reason_of(tmp_path / "folder.wav") == "directory"
    assert reason_of(tmp_path / "loop.wav") == "symlink_loop"
    assert reason_of("nul\0.wav") == "bad_path"
    assert reason_of(tmp_path / ("x" * 5000)) == "unreadable"


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    assert reason_of(tmp_path / "pipe.wav") == "not_a_file"


def test_text_named_wav(tmp_path):
    (tmp_path / "a.wav").write_text("404 not found")
    assert reason_of(tmp_path / "a.wav") == "not_audio"


def test_a_wav_of_no_samples(tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(0, np.float32), RATE)
    assert reason_of(tmp_path / "a.wav", read=probe) == "empty_audio"


# ---------------------------------------------------------------- truncated


@pytest.mark.parametrize(
    ("fmt", "subtype"),
    [("WAV", "PCM_16"), ("AIFF", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")],
)
def test_half_a_file_is_refused_by_its_header_alone(tmp_path, fmt, subtype):
    path = tmp_path / "a"
    sf.write(path, np.random.default_rng(0).standard_normal(4 * RATE) * 0.1, RATE, format=fmt, subtype=subtype)
    whole = path.read_bytes()
    probe(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert len(sf.read(path)[0]) > 0, "libsndfile reads it with no error: that is the trap"
    if fmt == "MP3" and b"Xing" not in whole and b"Info" not in whole:
        assert reason_of(path) == "truncated"  # nothing declared in the file: the decoded length tells
    else:
        assert reason_of(path, read=probe) == "truncated"


def test_a_wav_with_a_long_chunk_before_its_data_is_followed_to_the_end(tmp_path):
    body = tone().tobytes()
    junk = b"LIST" + struct.pack("<I", 100_000) + bytes(100_000)
    header = wav_header(data_bytes=len(body))
    (tmp_path / "a.wav").write_bytes(header[:36] + junk + header[36:] + body[:-1000])
    assert reason_of(tmp_path / "a.wav", read=probe) == "truncated"


def test_a_streamed_wav_of_unknown_size_is_no_truncated_one(tmp_path):
    body = (tone() * 32767).astype("<i2").tobytes()
    header = wav_header(data_bytes=len(body))
    (tmp_path / "a.wav").write_bytes(header[:40] + b"\xff\xff\xff\xff" + body)
    assert len(read_pcm(tmp_path / "a.wav")) == len(tone())


def test_half_a_flac_is_refused_when_decoded(tmp_path):
    path = tmp_path / "a.flac"
    sf.write(path, np.random.default_rng(0).standard_normal(RATE) * 0.1, RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert reason_of(path) in ("undecodable", "truncated")


# ---------------------------------------------------------------- headers that lie


def test_rate_of_one(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_header(rate=1) + bytes(3200))
    assert sf.info(tmp_path / "a.wav").samplerate == 1, "libsndfile opens it: that is the trap"
    assert reason_of(tmp_path / "a.wav", read=probe) == "bad_rate"


def test_1024_channels(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_header(channels=1024, data_bytes=20480) + bytes(20480))
    assert sf.info(tmp_path / "a.wav").channels == 1024, "libsndfile opens it: that is the trap"
    assert reason_of(tmp_path / "a.wav", read=probe) == "bad_channels"


def test_a_ten_hour_flac_is_refused_without_decoding_it(tmp_path, monkeypatch):
    path = tmp_path / "bomb.flac"
    with sf.SoundFile(path, "w", MIN_RATE, 1, subtype="PCM_16") as file:  # a low rate, to be quick
        silence_S = np.zeros(3600 * MIN_RATE, np.int16)
        for _ in range(10):
            file.write(silence_S)
    assert path.stat().st_size < 4_000_000
    assert sf.info(path).duration == 36_000

    def no_decoding(*_, **__):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(sf.SoundFile, "read", no_decoding)
    assert reason_of(path) == "too_long"


# ---------------------------------------------------------------- samples and spans


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_a_float_wav(tmp_path, bad):
    wave_S = tone()
    wave_S[100] = bad
    sf.write(tmp_path / "a.wav", wave_S, RATE, subtype="FLOAT")
    probe(tmp_path / "a.wav")
    assert reason_of(tmp_path / "a.wav") == "not_finite"


def test_silence_in_the_file_or_in_the_span_alone(tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(RATE, np.float32), RATE)
    assert reason_of(tmp_path / "a.wav") == "silent"
    sf.write(tmp_path / "b.wav", np.concatenate([tone(1.0), np.zeros(RATE, np.float32)]), RATE)
    read_pcm(tmp_path / "b.wav", 0.5, 1.5)
    assert reason_of(tmp_path / "b.wav", 1.2, 1.8) == "silent"


def test_lengths_from_10_ms_to_30_s(tmp_path):
    for name, seconds in (("least", 0.01), ("less", 0.009), ("most", 30.0), ("more", 30.1)):
        sf.write(tmp_path / f"{name}.wav", tone(seconds), RATE)
    assert len(read_pcm(tmp_path / "least.wav")) == 160
    assert len(read_pcm(tmp_path / "most.wav")) == 480_000
    assert reason_of(tmp_path / "less.wav") == "too_short"
    assert reason_of(tmp_path / "more.wav") == "too_long"
    read_pcm(tmp_path / "more.wav", 0.0, 30.0)


def test_spans_outside_the_file(tmp_path):
    sf.write(tmp_path / "a.wav", tone(1.0), RATE)
    assert reason_of(tmp_path / "a.wav", 1.0, 1.5) == "outside_file"
    assert reason_of(tmp_path / "a.wav", 0.5, 1.2) == "outside_file"
    assert len(read_pcm(tmp_path / "a.wav", 0.5, 1.003)) == 8000, "a rounded end is the file's end"


def test_bytes_are_judged_and_decoded_as_files_are(tmp_path: Path) -> None:
    samples_S = (np.sin(np.arange(22_050) / 9) * 9000).astype(np.int16)
    for suffix in ("wav", "flac", "ogg"):
        path = tmp_path / f"a.{suffix}"
        sf.write(path, samples_S, 22_050)
        np.testing.assert_array_equal(read_bytes(path.read_bytes()), read_pcm(path))
        with pytest.raises(AudioError, match=r"truncated|undecodable|empty_audio"):
            read_bytes(path.read_bytes()[: -9_000 if suffix == "wav" else -500])
    for content, reason in ((b"", "empty_file"), (b"<html>", "not_audio"), (path.read_bytes(), "too_long")):
        with pytest.raises(AudioError) as caught:
            read_bytes(content, max_s=0.5)
        assert caught.value.reason == reason


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_blocks_of_a_long_file_are_the_whole_file(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "long.wav"
    sf.write(path, np.random.default_rng(0).normal(0, 0.1, (rate * 7 + 123, 2)), rate)
    blocks = list(iterate_pcm(path, block_s=2.0))
    assert len(blocks) == 4
    whole_S = read_pcm(path)
    joined_S = np.concatenate(blocks)
    assert len(joined_S) == len(whole_S)
    if rate == 16_000:
        np.testing.assert_array_equal(joined_S, whole_S)
    else:  # one resampler over all blocks: no seam is heard
        assert np.abs(joined_S.astype(int) - whole_S).max() <= 2
    path.write_bytes(path.read_bytes()[:-50_000])
    with pytest.raises(AudioError, match="truncated"):
        list(iterate_pcm(path))
