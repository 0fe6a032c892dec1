"""Files and folders that are either wholly there or not at all, also after a kill -9 or a power cut.

Everything is written under a temporary name, fsynced, renamed, and the parent folder fsynced. Temporary names look like
`.NAME.tmp-1a2b3c4d`; `remove_strays` clears what a killed process has left. A folder also gets a MANIFEST.json with the
size and SHA-256 of each file, written last, so that a damaged copy is found out when it is read (a flipped bit in a
safetensors file loads without an error).
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "MANIFEST.json"
MANIFEST_FORMAT = 1


# --- single files ----------------------------------------------------------------------------------------------------


def write_file_atomically(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Create or replace one file. A callable gets the path to write to; it may leave strays beside it.

    On any failure `path` is as it was before. Mode: 0666 less the umask, whatever the writer chose.
    """
    folder = make_temporary_folder(path)
    try:
        temporary = folder / path.name
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        _settle_file(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def json_bytes(value: Any) -> bytes:
    """Strict JSON, for people to read too. ValueError for NaN and infinities, which no JSON has."""
    return (json.dumps(value, allow_nan=False, ensure_ascii=False, indent=1) + "\n").encode()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of detached CPU copies. Not atomic by itself: write into a temporary folder of this module."""
    save_file(_standalone(tensors), path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def save_single_file(path: Path, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """A one-file copy (`.pt`), atomic, of tensors and a strict-JSON `meta`; loads with weights_only=True."""
    content = {"tensors": _standalone(tensors), "meta": json.loads(json_bytes(meta))}
    write_file_atomically(path, lambda temporary: torch.save(content, temporary))


def load_single_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_single_file` wrote: (tensors on the CPU, meta). Runs no code from the file."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.keys() != {"tensors", "meta"}:
        raise ValueError(f"{path} is not a one-file copy of a model; allowed: a file written by save_single_file")
    return content["tensors"], content["meta"]


def _standalone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each alone in its storage: neither format may carry a view's whole base along."""
    copies, seen = {}, set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        storage = copy.untyped_storage()
        if storage.nbytes() != copy.numel() * copy.element_size() or storage.data_ptr() in seen:
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        copies[name] = copy
    return copies


# --- folders ---------------------------------------------------------------------------------------------------------


def write_folder_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Create or replace a folder: `write` fills a temporary one, a manifest is added, then the names are swapped.

    On any failure `path` is as it was before. Between two renames a killed process can leave the old folder under its
    aside name only: `recover_folder` puts it back.
    """
    temporary = make_temporary_folder(path)
    try:
        write(temporary)
        seal_folder(temporary)
        replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_files(path: Path, changed: Mapping[str, bytes]) -> None:
    """Replace some files of a sealed folder, all at once: a new folder takes its place, the other files linked into it.

    What else the manifest says stays. ValueError when the folder has no readable manifest.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        entries = {name: entry for name, entry in manifest.pop("files").items() if name not in changed}
        del manifest["format"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path / MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    temporary = make_temporary_folder(path)
    try:
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path).as_posix()
            if file.is_dir():
                (temporary / name).mkdir(parents=True, exist_ok=True)
            elif name != MANIFEST and name not in changed:
                _link_or_copy(file, temporary / name)
        for name, content in changed.items():
            (temporary / name).write_bytes(content)
        seal_folder(temporary, entries, **manifest)
        replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # some file systems have no hard links
        shutil.copyfile(source, target)


def seal_folder(folder: Path, known: Mapping[str, dict] | None = None, **facts: Any) -> None:
    """Set modes, fsync every file, write the manifest last.

    known: manifest entries of files that other processes wrote and settled; `facts` go into the manifest.
    """
    entries = dict(known or {})
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != MANIFEST and name not in entries:
            entries[name] = settle_and_describe(file)
    for subfolder in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _fsync(subfolder)
    manifest = folder / MANIFEST
    manifest.write_bytes(json_bytes({"format": MANIFEST_FORMAT, **facts, "files": dict(sorted(entries.items()))}))
    _settle_file(manifest)
    _fsync(folder)


def settle_and_describe(file: Path) -> dict[str, Any]:
    """Make one file durable; its manifest entry."""
    _settle_file(file)
    return {"size": file.stat().st_size, "sha256": _sha256(file)}


def replace_folder(temporary: Path, path: Path) -> None:
    """Give a sealed temporary folder its name; the folder that had it before is removed."""
    aside = _aside(path)
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        recover_folder(path)
        raise
    _fsync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover_folder(path: Path) -> bool:
    """Undo a replacement that was cut between its two renames; True when the old folder was put back."""
    aside = _aside(path)
    if not aside.exists():
        return False
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        return False
    os.rename(aside, path)
    _fsync(path.parent)
    return True


def remove_folder(path: Path) -> None:
    """Remove a folder so that a half-removed one never bears its name."""
    doomed = _temporary_name(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def damage(folder: Path) -> str | None:
    """Why the folder does not match its manifest, naming the file; None when it does. Reads every byte."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if manifest["format"] != MANIFEST_FORMAT:
            return f"{MANIFEST} has format {manifest['format']!r}; this program reads {MANIFEST_FORMAT}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for name, (size, sha256) in entries.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            return f"{MANIFEST} names {name}, outside the folder"
        try:
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, {MANIFEST} says {size}"
            if _sha256(file) != sha256:
                return f"{name} has another sha256 than {MANIFEST} says"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def remove_strays(folder: Path) -> list[str]:
    """Clear a folder of temporaries that killed processes left, and finish cut replacements. Returns the names.

    Only for the one process that owns the folder: a temporary of a live one is not told apart from a dead one's.
    """
    removed = []
    for item in sorted(folder.glob(".*")):
        if item.name.endswith(".old"):
            recover_folder(folder / item.name[1 : -len(".old")])
        elif ".tmp-" in item.name:
            shutil.rmtree(item, ignore_errors=True)
            removed.append(item.name)
    return removed


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


def make_temporary_folder(path: Path) -> Path:
    """A fresh folder beside `path`, on the same file system, to become `path` by `replace_folder`."""
    folder = _temporary_name(path)
    folder.mkdir(parents=True)  # not mkdtemp: its mode 0700 would stay with the result
    return folder


def _settle_file(file: Path) -> None:
    """Give the mode that an ordinary open() would have given (safetensors makes 0600), and fsync."""
    file.chmod(file.parent.stat().st_mode & 0o666)
    _fsync(file)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network mounts: files only
            raise
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
