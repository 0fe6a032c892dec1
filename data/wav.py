"""The commonest audio file read without a decoder: RIFF/WAVE of 44 bytes of header and 16-bit mono samples at 16 kHz.

    "RIFF" size-8 "WAVE" | "fmt " 16, PCM, 1 channel, 16000, 32000, 2, 16 | "data" size-44 | samples

Anything that differs in one byte of this header, however harmlessly, is libsndfile's. Opening and decoding two seconds
there costs more than all else that packing does to them.
"""

from __future__ import annotations

import struct

import numpy as np

_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
_FORMAT = (b"WAVE", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16, b"data")


def plain_wav(content: bytes | bytearray) -> np.ndarray | None:
    """The samples, int16 [S] over `content`, if it is exactly such a file, whole and not empty; else None."""
    if len(content) <= _HEADER.size or len(content) % 2:
        return None
    riff, riff_size, *form, data_size = _HEADER.unpack_from(content)
    if riff != b"RIFF" or tuple(form) != _FORMAT:
        return None
    if riff_size != len(content) - 8 or data_size != len(content) - _HEADER.size:
        return None
    return np.frombuffer(content, dtype="<i2", offset=_HEADER.size)
