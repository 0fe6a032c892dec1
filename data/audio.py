"""Audio files in: a header check that costs no decoding, and int16 16 kHz mono out, or an `AudioError` with a reason.

libsndfile opens much that cannot be trained on: half a WAV, OGG or MP3 reads without an error, a header may declare
one sample a second, 1024 channels or ten hours in two megabytes, floats may be NaN. So `probe` judges the header
(and the container's own sizes) before anything is decoded, and `read_pcm` never asks for more frames than were
declared, then compares what came with what was promised.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile as sf
import soxr

from data.containers import Place, place_of
from data.wav import plain_wav

SAMPLE_RATE = 16_000  # Hz, of everything that leaves this file
MIN_CLIP_S, MAX_CLIP_S = 0.01, 30.0
MIN_RATE, MAX_RATE = 4_000, 384_000
MAX_CHANNELS = 8
# A file up to this long is decoded whole and cut afterwards, a longer one is read by span. It depends on the file
# alone, never on what happens to be cached, so that a clip's samples are the same in every run.
WHOLE_FILE_S = 120.0
SILENCE_PEAK = 1e-4  # of full scale, about three steps of 16 bits
MAX_DECODED = 12_000_000  # samples over all channels of a file in memory: 30 s of 8 channels at 48 kHz
OGG_TAIL = 70_000  # bytes: an Ogg page is at most 65,307
MAX_MEMBER_BYTES = 1 << 29  # an audio file within a container is read into memory whole


class AudioError(Exception):
    """A file or span that cannot be used: `reason` for counting, `detail` for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a header declares."""

    frames: int
    rate: int
    channels: int

    @property
    def duration_s(self) -> float:
        return self.frames / self.rate


def probe(path: str | Path) -> AudioInfo:
    """Judge a file by its header. Raises AudioError; decodes nothing."""
    with _opened(path) as (_, info):
        return info


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[sf.SoundFile, AudioInfo]]:
    """A file whose header was judged, open for decoding: opening it twice costs as much as decoding a short WAV."""
    place = place_of(path)
    num_bytes = _regular_file_size(place)
    with (
        open(path, "rb", buffering=0) if place.size is None else _in_memory(place) as file,
        _judged(place, file, num_bytes) as judged,
    ):
        yield judged


@contextmanager
def _judged(source: Place | BinaryIO, file: BinaryIO, num_bytes: int) -> Iterator[tuple[sf.SoundFile, AudioInfo]]:
    """`file`: the same bytes as `source`, for a look at the container's own sizes."""
    try:
        sound = _sound_file(source)
    except (sf.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        raise AudioError("not_audio", f"libsndfile cannot open it ({_said(error)})") from error
    with sound:
        info = AudioInfo(sound.frames, sound.samplerate, sound.channels)
        if not MIN_RATE <= info.rate <= MAX_RATE:
            raise AudioError("bad_rate", f"{info.rate} Hz; allowed are {MIN_RATE} to {MAX_RATE}")
        if not 1 <= info.channels <= MAX_CHANNELS:
            raise AudioError("bad_channels", f"{info.channels} channels; allowed are 1 to {MAX_CHANNELS}")
        file.seek(0)
        _check_container(file, num_bytes)
        if info.frames <= 0:
            raise AudioError("empty_audio", "the header declares no samples")
        yield sound, info


def check_span(info: AudioInfo, start_s: float | None, end_s: float | None) -> float:
    """Duration in seconds of the span (None = the file's start, end) of a probed file; AudioError if it is unusable."""
    start_s = start_s or 0.0
    end_s = info.duration_s if end_s is None else end_s
    # Annotations round to milliseconds: an end slightly beyond the file is the file's end.
    if start_s >= info.duration_s or end_s > info.duration_s + 0.05:
        raise AudioError("outside_file", f"span {start_s} to {end_s} s of a file of {info.duration_s:.3f} s")
    duration_s = min(end_s, info.duration_s) - start_s
    if duration_s < MIN_CLIP_S:
        raise AudioError("too_short", f"{duration_s:.4f} s; allowed are {MIN_CLIP_S} to {MAX_CLIP_S}")
    if duration_s > MAX_CLIP_S + 1e-6:
        raise AudioError("too_long", f"{duration_s:.2f} s; allowed are {MIN_CLIP_S} to {MAX_CLIP_S}")
    return duration_s


def read_pcm(path: str | Path, start_s: float | None = None, end_s: float | None = None) -> np.ndarray:
    """The span (None = the file's start, end; seconds) as int16 [S], 16 kHz mono. Raises AudioError."""
    if (plain_S := _read_plain(path)) is not None:
        check_span(AudioInfo(len(plain_S), SAMPLE_RATE, 1), start_s, end_s)
        return cut(plain_S, start_s, end_s)
    with _opened(path) as (sound, info):
        check_span(info, start_s, end_s)
        if info.duration_s <= WHOLE_FILE_S:
            return cut(_decode(sound, info, 0, info.frames), start_s, end_s)
        first = round((start_s or 0.0) * info.rate)
        last = min(info.frames, round(end_s * info.rate) if end_s is not None else info.frames)
        pcm_S = _decode(sound, info, first, last - first)
    _refuse_silence(pcm_S)
    return pcm_S


def _read_plain(path: str | Path) -> np.ndarray | None:
    """All samples of a file that is decoded whole and needs no decoder; None of any other. Raises AudioError."""
    if not str(path).endswith(".wav"):
        return None
    num_bytes = _regular_file_size(place_of(path))
    if num_bytes > WHOLE_FILE_S * SAMPLE_RATE * 2:
        return None
    try:
        with open(path, "rb", buffering=0) as file:
            return plain_wav(file.read(num_bytes))
    except OSError:
        return None  # said by those who open it next


def decode_for(path: str | Path, start_s: float | None, end_s: float | None) -> tuple[AudioInfo, np.ndarray | None]:
    """The header, and all samples (int16 [S], 16 kHz mono) of a file that is decoded whole; None of a longer one.

    Raises AudioError, also where the span is not within the file.
    """
    if (plain_S := _read_plain(path)) is not None:
        info = AudioInfo(len(plain_S), SAMPLE_RATE, 1)
        check_span(info, start_s, end_s)
        return info, plain_S
    with _opened(path) as (sound, info):
        check_span(info, start_s, end_s)
        return info, _decode(sound, info, 0, info.frames) if info.duration_s <= WHOLE_FILE_S else None


def read_bytes(content: bytes, max_s: float = MAX_CLIP_S) -> np.ndarray:
    """An audio file's bytes (WAV, FLAC, Ogg, MP3, ...) as int16 [S], 16 kHz mono. Raises AudioError.

    What is longer than `max_s` is refused by its header: two megabytes can declare ten hours.
    """
    if not content:
        raise AudioError("empty_file", "0 bytes")
    with _judged(io.BytesIO(content), io.BytesIO(content), len(content)) as (sound, info):
        if not MIN_CLIP_S <= info.duration_s <= max_s + 1e-6:
            reason = "too_short" if info.duration_s < MIN_CLIP_S else "too_long"
            raise AudioError(reason, f"{info.duration_s:.4f} s; allowed are {MIN_CLIP_S} to {max_s}")
        if info.frames * info.channels > MAX_DECODED:
            detail = f"{info.frames} samples of {info.channels} channels; send it at 48 kHz or below"
            raise AudioError("too_large", detail)
        return _decode(sound, info, 0, info.frames)


def iterate_pcm(path: str | Path, block_s: float = 10.0) -> Iterator[np.ndarray]:
    """A file of any length in blocks of about `block_s` seconds, int16 [S], 16 kHz mono. Raises AudioError."""
    info = probe(path)
    resampler = None if info.rate == SAMPLE_RATE else soxr.ResampleStream(info.rate, SAMPLE_RATE, 1, dtype="float32")
    done = 0
    try:
        with _sound_file(place_of(path)) as file:
            while done < info.frames:
                samples_SC = file.read(min(info.frames - done, round(block_s * info.rate)), "float32", always_2d=True)
                if not len(samples_SC):
                    raise AudioError("truncated", f"{done} of {info.frames} declared samples could be decoded")
                done += len(samples_SC)
                mono_S = _mono(samples_SC)
                if resampler is not None:
                    mono_S = resampler.resample_chunk(mono_S, last=done == info.frames)
                yield to_int16(mono_S)
    except (sf.LibsndfileError, RuntimeError, ValueError) as error:
        raise AudioError("undecodable", _said(error)) from error


def to_int16(mono_S: np.ndarray) -> np.ndarray:
    """Floats of full scale 1 as int16, rounded and clipped."""
    return np.clip(np.rint(mono_S * 32768.0), -32768, 32767).astype(np.int16)


def cut(pcm_S: np.ndarray, start_s: float | None, end_s: float | None) -> np.ndarray:
    """The span (seconds) out of int16 [S] at 16 kHz; AudioError when it is silent or too short."""
    first = round((start_s or 0.0) * SAMPLE_RATE)
    last = len(pcm_S) if end_s is None else min(len(pcm_S), round(end_s * SAMPLE_RATE))
    span_S = pcm_S[first:last]
    if len(span_S) < round(MIN_CLIP_S * SAMPLE_RATE):
        raise AudioError("too_short", f"{len(span_S)} samples at {SAMPLE_RATE} Hz")
    _refuse_silence(span_S)
    return span_S


def _decode(sound: sf.SoundFile, info: AudioInfo, first: int, frames: int) -> np.ndarray:
    # 16 bits that need neither mixing nor resampling stay as they are; by way of floats they would be the same.
    is_plain = info.rate == SAMPLE_RATE and info.channels == 1 and sound.subtype == "PCM_16"
    try:
        if first:
            sound.seek(first)
        samples_SC = sound.read(frames, dtype="int16" if is_plain else "float32", always_2d=True)
    except (sf.LibsndfileError, RuntimeError, ValueError) as error:
        raise AudioError("undecodable", _said(error)) from error
    if len(samples_SC) != frames:
        raise AudioError("truncated", f"{len(samples_SC)} of {frames} declared samples could be decoded")
    if is_plain:
        return samples_SC[:, 0]
    mono_S = _mono(samples_SC)
    if info.rate != SAMPLE_RATE:
        mono_S = soxr.resample(mono_S, info.rate, SAMPLE_RATE)
    return to_int16(mono_S)


def _mono(samples_SC: np.ndarray) -> np.ndarray:
    mono_S = samples_SC.mean(axis=1) if samples_SC.shape[1] > 1 else samples_SC[:, 0]
    if not np.isfinite(mono_S).all():
        raise AudioError("not_finite", f"{int((~np.isfinite(mono_S)).sum())} samples are NaN or infinite")
    return mono_S


def _refuse_silence(pcm_S: np.ndarray) -> None:
    peak = max(int(pcm_S.max(initial=0)), -int(pcm_S.min(initial=0)))
    if peak <= SILENCE_PEAK * 32768:
        raise AudioError("silent", f"the loudest sample is {peak} of 32768")


def _sound_file(source: Place | BinaryIO) -> sf.SoundFile:
    """A file, a part of one, or bytes, open for decoding. Raises AudioError, and what soundfile raises."""
    if not isinstance(source, Place):
        return sf.SoundFile(source)
    if source.size is None:
        return sf.SoundFile(source.path)
    if source.is_raw:
        return sf.SoundFile(_in_memory(source), "r", SAMPLE_RATE, 1, "PCM_16", "LITTLE", "RAW")
    return sf.SoundFile(_in_memory(source))


def _in_memory(place: Place) -> BinaryIO:
    """The bytes of a file within a container. Raises AudioError."""
    assert place.size is not None, place
    if place.size > MAX_MEMBER_BYTES:
        raise AudioError("too_large", f"{place.size} bytes within a container; allowed are {MAX_MEMBER_BYTES}")
    try:
        content = place.read(0, place.size)
    except OSError as error:
        raise AudioError("unreadable", error.strerror or str(error)) from error
    if len(content) != place.size:
        raise AudioError("truncated", f"{len(content)} of {place.size} bytes could be read")
    return io.BytesIO(content)


def _regular_file_size(place: Place) -> int:
    """Bytes of a place in a regular, readable, non-empty file. A FIFO must not be opened: that waits for a writer."""
    try:
        status = os.stat(place.path)
    except FileNotFoundError as error:
        raise AudioError("missing", "no such file") from error
    except OSError as error:
        reason = "symlink_loop" if "symbolic" in str(error) else "unreadable"
        raise AudioError(reason, error.strerror or str(error)) from error
    except ValueError as error:  # a NUL in the path
        raise AudioError("bad_path", str(error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise AudioError("directory", "it is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise AudioError("not_a_file", "it is a pipe, socket or device")
    if status.st_size == 0 or place.size == 0:
        raise AudioError("empty_file", "0 bytes")
    if not os.access(place.path, os.R_OK):
        raise AudioError("unreadable", "no permission to read it")
    if place.size is not None and place.offset + place.size > status.st_size:
        raise AudioError("truncated", f"it ends at byte {place.offset + place.size}, the file at {status.st_size}")
    return status.st_size if place.size is None else place.size


def _check_container(file: BinaryIO, num_bytes: int) -> None:
    """Compare the sizes that a container declares with the file's; AudioError "truncated" when bytes are missing."""
    head = file.read(2048)
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        _check_chunks(file, num_bytes, "little", b"data")
    elif head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        _check_chunks(file, num_bytes, "big", b"SSND")
    elif head[:4] == b"OggS":
        file.seek(max(0, num_bytes - OGG_TAIL))
        _check_ogg(file.read(OGG_TAIL))
    elif head[:3] == b"ID3" or head[:1] == b"\xff":
        _check_mp3(head, num_bytes)


def _check_chunks(file: BinaryIO, num_bytes: int, order: Literal["little", "big"], wanted: bytes) -> None:
    position = 12
    while position + 8 <= num_bytes:
        file.seek(position)
        name, size = file.read(4), int.from_bytes(file.read(4), order)
        if name == wanted:
            # 0xFFFFFFFF and 0 are written by programs that stream and do not know the size.
            if size not in (0, 0xFFFFFFFF) and position + 8 + size > num_bytes:
                missing = position + 8 + size - num_bytes
                raise AudioError("truncated", f"the header declares {missing} bytes more than the file has")
            return
        position += 8 + size + size % 2


def _check_ogg(tail: bytes) -> None:
    """The last page must be whole and carry the end-of-stream flag (RFC 3533)."""
    page = tail.rfind(b"OggS")
    segments = tail[page + 26] if page >= 0 and page + 27 <= len(tail) else 0
    lengths = tail[page + 27 : page + 27 + segments]
    whole = page >= 0 and len(lengths) == segments and page + 27 + segments + sum(lengths) <= len(tail)
    if not whole or not tail[page + 5] & 0x04:
        raise AudioError("truncated", "the last Ogg page is cut off or does not end the stream")


def _check_mp3(head: bytes, num_bytes: int) -> None:
    """A Xing/Info tag may declare the stream's bytes, counted from its frame, at most 36 bytes before the tag."""
    tag = max(head.find(b"Xing"), head.find(b"Info"))
    flags = int.from_bytes(head[tag + 4 : tag + 8], "big") if tag >= 0 else 0
    at = tag + 8 + (4 if flags & 1 else 0)
    if flags & 2 and at + 4 <= len(head):
        declared = int.from_bytes(head[at : at + 4], "big")
        if tag - 36 + declared > num_bytes:
            raise AudioError("truncated", f"the Xing tag declares {declared} bytes, the file has {num_bytes}")


def _said(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
