"""Clips' samples with a memory of decoded files, since decoding Ogg, MP3 or FLAC again for each chunk is slow."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from data.audio import AudioError, AudioInfo, check_span, cut, decode_for, read_pcm
from data.containers import SHARD_SUFFIX, place_of

BYTES_PER_MB = 1_000_000
SAMPLE_BYTES = 2


class AudioReader:
    """Reads spans as int16 [S], 16 kHz mono; the same samples as `read_pcm`, cached or not. Safe between threads.

    Whole files of up to WHOLE_FILE_S are kept, least recently used out first, up to `cache_mb` megabytes. Shards of a
    packed folder are mapped and take no memory of the process; their clips were checked when they were packed.
    """

    def __init__(self, cache_mb: int = 512) -> None:
        self.max_bytes = cache_mb * BYTES_PER_MB
        self.num_bytes = 0
        self._files: OrderedDict[str, tuple[AudioInfo, np.ndarray]] = OrderedDict()
        self._shards: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(self, path: str, start_s: float | None = None, end_s: float | None = None) -> np.ndarray:
        """The span (None = the file's start, end; seconds). Raises AudioError. The array is not to be written to."""
        place = place_of(path)
        if place.size is not None and place.path.endswith(SHARD_SUFFIX):
            pcm_S = self.read_shard(place.path, place.offset // SAMPLE_BYTES, place.size // SAMPLE_BYTES)
            return cut(pcm_S, start_s, end_s)
        with self._lock:
            kept = self._files.get(path)
            if kept is not None:
                self._files.move_to_end(path)
        if kept is not None:
            check_span(kept[0], start_s, end_s)
            return cut(kept[1], start_s, end_s)
        if self.max_bytes <= 0:
            return read_pcm(path, start_s, end_s)
        info, whole_S = decode_for(path, start_s, end_s)
        if whole_S is None:
            return read_pcm(path, start_s, end_s)
        whole_S.setflags(write=False)
        self._keep(path, info, whole_S)
        return cut(whole_S, start_s, end_s)

    def read_shard(self, path: str, first: int, num_samples: int) -> np.ndarray:
        """Samples of a packed folder's shard, as a view of its map. Raises AudioError."""
        shard_S = self._shards.get(path)
        if shard_S is None:
            try:
                shard_S = np.memmap(path, dtype="<i2", mode="r").view(np.ndarray)
            except FileNotFoundError as error:
                raise AudioError("missing", "no such file") from error
            except (OSError, ValueError) as error:
                raise AudioError("unreadable", str(error)) from error
            self._shards[path] = shard_S
        if not 0 <= first < first + num_samples <= len(shard_S):
            raise AudioError(
                "outside_file", f"samples from {first}, {num_samples} of them; the shard has {len(shard_S)}"
            )
        return shard_S[first : first + num_samples]

    def _keep(self, path: str, info: AudioInfo, pcm_S: np.ndarray) -> None:
        with self._lock:
            if path in self._files or pcm_S.nbytes > self.max_bytes:
                return
            self._files[path] = (info, pcm_S)
            self.num_bytes += pcm_S.nbytes
            while self.num_bytes > self.max_bytes:
                _, (_, dropped_S) = self._files.popitem(last=False)
                self.num_bytes -= dropped_S.nbytes
