"""What the Modal apps share: the image, the volumes, where things lie in a container, which GPUs there are.

Modal brings only the launched file into the container, so this one is added to the image beside it. There the
repository is a folder of files like anywhere else: nothing of it is imported here, programs are started from it.
"""

import os
import re
import tomllib
from pathlib import Path

import modal

# Places in a container.
REPO, DATA, RUNS, CACHE = "/earmark", "/data", "/runs", "/cache"

# GPU -> the most that Modal puts into one container. Modal's client lets any name pass, and the server asks for money.
GPUS = {
    "T4": 8,
    "L4": 8,
    "A10": 4,
    "L40S": 8,
    "A100-40GB": 8,
    "A100-80GB": 8,
    "H100": 8,
    "H200": 8,
    "B200": 8,
}
DEFAULT_GPU = "A100-40GB:8"

# What of the repository goes along: its code, its settings and its sample. Data sets and runs that lie in the checkout
# do not.
CODE = {
    "model": (".py",),
    "lora": (".py",),
    "data": (".py",),
    "losses": (".py",),
    "distributed": (".py",),
    "retrieval": (".py", ".html", ".js", ".css"),
    "bin": (".py",),
    "bench": (".py",),
    "launch": (".py", ".sh", ".toml", ".json", ".txt"),
    "samples": (".json", ".jsonl", ".ogg"),
}
TOP_FILES = ("pyproject.toml", "LICENSE")
UV_VERSION = "0.9.7"
FLASH_ATTENTION = "flash-attn==2.8.3"  # built in the image, for hours: only with EARMARK_FLASH=1

data_volume = modal.Volume.from_name("earmark-data", create_if_missing=True)
runs_volume = modal.Volume.from_name("earmark-runs", create_if_missing=True)
cache_volume = modal.Volume.from_name("earmark-cache", create_if_missing=True)
# Training cannot change the data it trains on; what a job writes is its run and the hub's cache.
VOLUMES: dict[str, modal.Volume] = {DATA: data_volume.read_only(), RUNS: runs_volume, CACHE: cache_volume}

ENVIRONMENT = {
    "HF_HOME": f"{CACHE}/huggingface",
    "XDG_CACHE_HOME": CACHE,
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Modal kills 30 s after its interrupt.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "25",
}


def is_left_out(path: Path) -> bool:
    """Whether a file of the repository (path from its root) stays at home."""
    top = path.parts[0]
    if len(path.parts) == 1:
        return top not in TOP_FILES
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return hidden or path.suffix not in CODE.get(top, ())


def requirements(root: Path, *extras: str) -> list[str]:
    """What pyproject.toml asks for, as requirements without versions of their own: the constraints pin them."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"].get(extra, [])
    return wanted


def build_image(*extras: str) -> modal.Image:
    """Packages pinned by launch/constraints.txt and installed by uv, then variables, then the repository's own files.

    In a container the module is imported again; the image is there already and its recipe is not needed.
    """
    if not modal.is_local():
        return modal.Image.debian_slim()
    root = Path(__file__).resolve().parent.parent
    constraints = root / "launch" / "constraints.txt"
    if os.environ.get("EARMARK_FLASH") == "1":
        # flash-attn compiles itself against the torch that is there, so it needs the CUDA compiler.
        image = modal.Image.from_registry("nvidia/cuda:12.8.1-devel-ubuntu22.04", add_python="3.12")
    else:
        image = modal.Image.debian_slim(python_version="3.12")
    image = (
        image.apt_install("gcc", "libc6-dev")  # Triton compiles its launchers with it
        .add_local_file(constraints, "/constraints.txt", copy=True)
        .uv_pip_install(
            *requirements(root, *extras), extra_options="--constraint /constraints.txt", uv_version=UV_VERSION
        )
    )
    if os.environ.get("EARMARK_FLASH") == "1":
        image = image.uv_pip_install("ninja", "packaging", "setuptools", "wheel", uv_version=UV_VERSION)
        image = image.uv_pip_install(FLASH_ATTENTION, extra_options="--no-build-isolation", uv_version=UV_VERSION)
    # Files come last: an edit of the code then rebuilds nothing.
    return (
        image.env(ENVIRONMENT)
        .add_local_dir(root, REPO, ignore=lambda path: is_left_out(Path(path)))
        .add_local_file(__file__, "/root/modal_setup.py")
    )


def parse_gpu(text: str) -> tuple[str, int]:
    """("A100-40GB", 8) out of "A100-40GB:8". Raises ValueError with what there is."""
    found = re.fullmatch(r"([A-Za-z0-9-]+?)(?::([1-9][0-9]?))?", text)
    names = {name.upper(): name for name in GPUS}
    name = names.get(found[1].upper()) if found else None
    if found is None or name is None:
        raise ValueError(f"gpu: got {text!r}; allowed: NAME or NAME:COUNT, with NAME one of {', '.join(GPUS)}")
    count = int(found[2] or 1)
    if count > GPUS[name]:
        raise ValueError(f"gpu: got {text!r}; allowed: up to {GPUS[name]} of {name} in one container")
    return name, count


def resources(name: str, count: int) -> tuple[int, int]:
    """(CPU cores, MiB of memory) for so many GPUs: 64 and 256 GiB at eight, in proportion below."""
    return 8 * count, 32768 * count
