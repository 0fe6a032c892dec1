"""Every audio header read once before training, in parallel threads, and remembered from run to run.

The cache is JSON Lines, one file a line, good as long as size and modification time are the same. It only saves
time: when it cannot be read or written the checks are made anew, with a warning.
"""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data.audio import AudioError, AudioInfo, check_span, probe
from data.clip import Clip
from data.containers import place_of
from data.drops import DropLog

logger = logging.getLogger(__name__)

PROBE_THREADS = 16  # they mostly wait for the file system


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a probe found: the header's numbers, or a reason and detail."""

    size: int
    mtime_ns: int
    frames: int = 0
    rate: int = 1
    channels: int = 0
    reason: str = ""
    detail: str = ""

    @property
    def info(self) -> AudioInfo:
        if self.reason:
            raise AudioError(self.reason, self.detail)
        return AudioInfo(self.frames, self.rate, self.channels)


def default_cache_path() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "earmark" / "audio_checks.jsonl"


def check_clips(
    clips: list[Clip], drops: DropLog, cache_path: str | Path | None = None, num_threads: int = PROBE_THREADS
) -> list[Clip]:
    """The clips whose file and span are usable by their header, each with its `duration_s`, in order.

    The others are added to `drops`; the caller checks the limit. What only decoding shows (NaN, silence, a corrupt
    stream) is found by the loader.
    """
    cache_path = Path(cache_path) if cache_path else default_cache_path()
    known = _read_cache(cache_path)
    paths = list(dict.fromkeys(clip.audio_path for clip in clips))
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        verdicts = dict(zip(paths, pool.map(lambda path: _verdict(path, known.get(path)), paths), strict=True))
    fresh = {path: verdict for path, verdict in verdicts.items() if verdict is not known.get(path)}
    logger.info("audio headers: %d files, %d of them checked before", len(paths), len(paths) - len(fresh))
    if fresh:
        _write_cache(cache_path, known | fresh)

    kept = []
    for clip in clips:
        try:
            duration_s = check_span(verdicts[clip.audio_path].info, clip.start_s, clip.end_s)
        except AudioError as error:
            drops.add(error.reason, clip.source, f"{clip.audio_path}: {error.detail}")
        else:
            kept.append(replace(clip, duration_s=duration_s))
    return kept


def _verdict(path: str, known: Verdict | None) -> Verdict:
    try:
        status = os.stat(place_of(path).path)
        size, mtime_ns = status.st_size, status.st_mtime_ns
    except (OSError, ValueError):
        size, mtime_ns = -1, -1  # the probe says why
    if known is not None and (known.size, known.mtime_ns) == (size, mtime_ns) and size >= 0:
        return known
    try:
        info = probe(path)
    except AudioError as error:
        return Verdict(size, mtime_ns, reason=error.reason, detail=error.detail)
    return Verdict(size, mtime_ns, info.frames, info.rate, info.channels)


def _read_cache(path: Path) -> dict[str, Verdict]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {row.pop("path"): Verdict(**row) for row in map(json.loads, lines)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("audio check cache %s cannot be used, all headers are read again: %s", path, error)
        return {}


def _write_cache(path: Path, verdicts: dict[str, Verdict]) -> None:
    """Replace the file in one rename: other processes may write it too, and the last one wins."""
    # Trouble of reaching a file (missing, no permission) may pass without the file changing: not remembered.
    stable = {
        path: verdict for path, verdict in verdicts.items() if verdict.reason != "unreadable" and verdict.size >= 0
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"path": name} | asdict(verdict)) + "\n" for name, verdict in stable.items())
        os.replace(partial, path)
    except OSError as error:
        logger.warning("audio check cache %s cannot be written, the next run reads all headers again: %s", path, error)
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            logger.debug("a partial cache file stays: %s", partial)
