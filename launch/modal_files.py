"""Files between this machine and Modal's volumes: upload by content, fetch what is new. Runs on this machine only."""

import argparse
import hashlib
import io
import json
import os
import sys
import time
from pathlib import Path, PurePosixPath
from typing import Any

import modal

MANIFEST = ".earmark-manifest.json"
GROUP_BYTES, GROUP_FILES = 2 << 30, 500  # an interrupted upload loses one group at most
MANY_FILES = 20_000  # volumes get slow from here on; they refuse more than 500,000
HEAVY = ("checkpoints",)  # of a run, fetched with --all only


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_files(paths: list[Path], to: str) -> dict[str, Path]:
    """{path on the volume: file} of files and folders; a folder's content keeps its folder's name."""
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"upload: {path} does not exist")
        path = path.resolve()
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            inside = file.relative_to(path.parent)
            if not any(part.startswith(".") for part in inside.parts):
                found[str(PurePosixPath("/") / to / inside.as_posix())] = file
    if not found:
        raise ValueError(f"upload: no file under {', '.join(map(str, paths))}")
    return found


def read_manifest(volume: modal.Volume) -> dict[str, dict[str, Any]]:
    """{path: {sha256, size}} of what earlier uploads put there; empty for a fresh volume."""
    try:
        return json.loads(b"".join(volume.read_file(MANIFEST)))
    except FileNotFoundError:
        return {}


def changed(
    files: dict[str, Path], hashes: dict[str, str], known: dict[str, dict[str, Any]], sizes: dict[str, int]
) -> list[str]:
    """Paths to send: new, with other content, or no longer on the volume as the manifest says."""
    return [
        path
        for path, file in files.items()
        if known.get(path) != {"sha256": hashes[path], "size": file.stat().st_size}
        or sizes.get(path) != file.stat().st_size
    ]


def upload(volume: modal.Volume, argv: list[str]) -> None:
    """Send what is new or has other content. The manifest grows group by group, so an upload may be interrupted."""
    parser = argparse.ArgumentParser(prog="modal run launch/modal_job.py upload", allow_abbrev=False)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--to", default="", help="folder on the volume (default: its root)")
    given = parser.parse_args(argv)
    files = local_files(given.paths, given.to)
    if len(files) > MANY_FILES:
        print(f"warning: {len(files)} files; pack them into shards first (bin/pack.py): volumes are slow with many")
    print(f"reading {len(files)} files ...", flush=True)
    hashes = {path: sha256(file) for path, file in files.items()}
    known = read_manifest(volume)
    there = {f"/{entry.path.lstrip('/')}": entry.size for entry in volume.iterdir("/", recursive=True)}
    todo = changed(files, hashes, known, there)
    total, sent, started = sum(files[path].stat().st_size for path in todo), 0, time.monotonic()
    print(f"{len(files) - len(todo)} files are there already; {len(todo)} to send, {total / 1e6:.1f} MB", flush=True)
    while todo:
        group, size = [], 0
        while todo and len(group) < GROUP_FILES and (not group or size < GROUP_BYTES):
            group.append(todo.pop(0))
            size += files[group[-1]].stat().st_size
        with volume.batch_upload(force=True) as batch:
            for path in group:
                batch.put_file(files[path], path)
        known |= {path: {"sha256": hashes[path], "size": files[path].stat().st_size} for path in group}
        with volume.batch_upload(force=True) as batch:
            batch.put_file(io.BytesIO(json.dumps(known).encode()), f"/{MANIFEST}")
        sent += size
        rate = sent / max(1e-9, time.monotonic() - started)
        left_s = (total - sent) / max(1.0, rate)
        print(f"  {sent / 1e6:.1f} of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {left_s:.0f} s left", flush=True)
    print("upload: all files are on the volume")


def fetch(volume: modal.Volume, argv: list[str]) -> None:
    """Bring a run's results here: everything but its checkpoints. What is here with its size and time stays."""
    parser = argparse.ArgumentParser(prog="modal run launch/modal_job.py fetch", allow_abbrev=False)
    parser.add_argument("run")
    parser.add_argument("--to", type=Path, default=Path("runs"))
    parser.add_argument("--all", action="store_true", help="the checkpoints with optimizer state, too")
    given = parser.parse_args(argv)
    try:
        entries = [e for e in volume.iterdir(f"/{given.run}", recursive=True) if e.type.name == "FILE"]
    except (FileNotFoundError, modal.exception.NotFoundError):
        raise ValueError(
            f"fetch: there is no run {given.run!r} on the volume; see: modal volume ls earmark-runs"
        ) from None
    fetched = num_bytes = 0
    for entry in entries:
        inside = PurePosixPath(entry.path.lstrip("/")).relative_to(given.run)
        if inside.is_absolute() or ".." in inside.parts or (not given.all and inside.parts[0] in HEAVY):
            continue
        place = given.to / given.run / inside
        if place.exists() and (place.stat().st_size, int(place.stat().st_mtime)) == (entry.size, int(entry.mtime)):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.part")
        with partial.open("wb") as file:
            num_bytes += volume.read_file_into_fileobj(entry.path, file)
        os.utime(partial, (entry.mtime, entry.mtime))
        partial.replace(place)
        fetched += 1
        if sys.stdout.isatty():
            print(f"\r  {fetched} files, {num_bytes / 1e6:.1f} MB", end="", flush=True)
    print(f"\nfetch: {fetched} new of {len(entries)} files, {num_bytes / 1e6:.1f} MB, in {given.to / given.run}")
