"""Looks over a machine before a run: each finding with what to do about it.

    python bin/doctor.py --preset a100_40gb_x8 --train_samples_path train.json --test_samples_path test.json
    python bin/doctor.py --preset quickstart --json

It takes the flags of bin/train.py, so that GPU memory, model and data are judged for the run that is meant; without
data flags a missing data file is only a warning. It says whether secrets are there, never what they are. Exit code: 0;
1 when something would stop the run; 2 for wrong settings.
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from bin.config import Config, parse
from bin.ending import tell_error
from bin.redaction import redact, secret_values
from data.clips import load_clips
from data.drops import DropLog
from data.reader import AudioReader
from data.records import find_file, iterate_records
from data.settings import DataSettings
from distributed.processes import ranks_per_gpu
from model.attention import SHORT, resolve_backend

State = Literal["ok", "warn", "fail"]
NUM_SAMPLED = 20  # records of each sample file whose audio is read
MIN_DISK_GIB, MIN_CACHE_GIB, MIN_SHM_GIB, MIN_OPEN_FILES = 5.0, 20.0, 1.0, 4096
# The published model: towers in bf16 (14.4) and CUDA's own share; a clip of 1.6 s without and with checkpointing, as
# measured on an H100.
TOWERS_GIB, GIB_A_CLIP, GIB_A_CLIP_CHECKPOINTED = 16.0, 0.12, 0.04
LORA_FREE_TOWERS = "Qwen/Qwen2-Audio-7B"
REACH_S = 5.0


@dataclass
class Finding:
    name: str
    state: State
    found: str
    remedy: str = ""  # empty only when all is well


def ok(name: str, found: str) -> Finding:
    return Finding(name, "ok", found)


# --- software --------------------------------------------------------------------------------------------------------


def nvidia_smi() -> str | None:
    """What nvidia-smi prints; None without a driver."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def check_gpu_software(wants_gpu: bool) -> Iterator[Finding]:
    """Torch's CUDA against the driver's, NCCL."""
    smi, built_for = nvidia_smi(), torch.version.cuda
    driver = re.search(r"Driver Version:\s*([\d.]+)", smi or "")
    supported = re.search(r"CUDA Version:\s*([\d.]+)", smi or "")
    yield ok("torch", f"{torch.__version__}, built for {'CUDA ' + built_for if built_for else 'the CPU only'}")
    if driver is None:
        remedy = "install the NVIDIA driver (in a container: start it with --gpus all), or take --preset quickstart"
        yield Finding("driver", "fail" if wants_gpu else "ok", "no NVIDIA driver", remedy if wants_gpu else "")
        return
    said = f"driver {driver[1]}, CUDA up to {supported[1] if supported else '?'}"
    if built_for is None:
        remedy = "pip install torch from the default index (not .../whl/cpu); see docs/install.md"
        yield Finding("driver", "fail", f"{said}, but torch has no CUDA", remedy)
    elif supported and _version(built_for)[0] > _version(supported[1])[0]:
        remedy = f"update the driver, or install a torch for CUDA {_version(supported[1])[0]}"
        yield Finding("driver", "fail", f"{said}; torch needs {built_for}", remedy)
    elif not torch.cuda.is_available():
        remedy = "restart the machine after a driver update; check CUDA_VISIBLE_DEVICES and the container's --gpus"
        yield Finding("driver", "fail", f"{said}, but torch sees no GPU", remedy)
    else:
        yield ok("driver", said)
        yield ok("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def check_kernels() -> Iterator[Finding]:
    """CUDA_HOME, flash-attn, Triton, the attention kernel that a run would take."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and not (Path(home) / "bin" / "nvcc").exists():
        yield Finding("CUDA_HOME", "warn", f"{home} has no bin/nvcc", "unset CUDA_HOME, or point it at a CUDA toolkit")
    else:
        yield ok("CUDA_HOME", home or "not set (only needed to build flash-attn from source)")
    for name, package, why in (
        ("flash-attn", "flash_attn", "optional: pip install flash-attn --no-build-isolation"),
        ("Triton", "triton", "pip install triton (comes with torch for CUDA)"),
    ):
        try:
            importlib.import_module(package)
            yield ok(name, importlib.metadata.version(package.replace("_", "-")))
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            is_wanted = torch.cuda.is_available() and (name == "Triton" or not missing)
            found = "not installed" if missing else f"cannot be loaded ({str(error)[:120]})"
            yield Finding(name, "warn" if is_wanted else "ok", found, why if is_wanted else "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    short, long = (resolve_backend("auto", device, dtype, is_short=is_short) for is_short in (True, False))
    yield ok("attention", short if short == long else f"{short} up to {SHORT} tokens, {long} beyond")


def check_trackers(config: Config) -> Iterator[Finding]:
    """The packages of the trackers that the settings ask for."""
    run = config.run
    for package, is_wanted, without in (
        ("tensorboard", run.tensorboard, "--no-tensorboard"),
        ("wandb", run.wandb, "leave --wandb out"),
    ):
        if is_wanted and importlib.util.find_spec(package) is None:
            yield Finding(package, "fail", "not installed", f"pip install {package}, or {without}")
        elif is_wanted:
            yield ok(package, importlib.metadata.version(package))


# --- hardware --------------------------------------------------------------------------------------------------------


def needed_gib(config: Config, num_gpus: int) -> float | None:
    """Memory of a GPU for the run; None when only a trial can tell (other towers than the published ones)."""
    model = config.model
    if not model.model_name.startswith(LORA_FREE_TOWERS) or model.audio_model or model.text_model:
        return None
    if model.trainable == "full":
        return None
    clips = config.train.batch_size / config.train.grad_accum_steps / num_gpus
    return ranks_per_gpu() * TOWERS_GIB + clips * (GIB_A_CLIP_CHECKPOINTED if model.checkpointing else GIB_A_CLIP)


def check_gpus(config: Config) -> Iterator[Finding]:
    """Which, bf16 and fp8, memory against the settings."""
    if not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    needed = needed_gib(config, count)
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info(index))
        fp8 = "fp8 too" if (properties.major, properties.minor) >= (8, 9) else "no fp8"
        said = f"{properties.name}, {free:.0f} of {total:.0f} GiB free, {fp8}"
        name = f"GPU {index}"
        if properties.major < 8:
            yield Finding(name, "fail", f"{said}, no bf16", "take a GPU of Ampere (A100, A10, RTX 30) or newer")
        elif needed is not None and needed > total:
            remedy = "lower --batch_size, set --checkpointing, raise --grad_accum_steps, or take more or larger GPUs"
            yield Finding(name, "fail", f"{said}; the settings need about {needed:.0f} GiB", remedy)
        elif needed is not None and needed > free:
            yield Finding(name, "warn", f"{said}; about {needed:.0f} GiB are needed", "end what else runs (nvidia-smi)")
        else:
            yield ok(name, said + (f"; about {needed:.0f} GiB needed" if needed else ""))


def check_disk(name: str, folder: Path, least_gib: float, flag: str) -> Finding:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    said = f"{free:.1f} GiB free for {folder}"
    if not os.access(place, os.W_OK):
        return Finding(name, "fail", f"{place} cannot be written", f"set {flag} to another folder")
    if free < least_gib:
        return Finding(name, "fail", said, f"free some space ({least_gib:g} GiB), or set {flag} to a folder elsewhere")
    return ok(name, said)


def check_limits() -> Iterator[Finding]:
    """Shared memory and open files."""
    shm = Path("/dev/shm")
    if shm.exists():
        free = shutil.disk_usage(shm).free / 2**30
        good = free >= MIN_SHM_GIB
        remedy = "" if good else "docker run --shm-size=8g (or --ipc=host); NCCL and loader workers use it"
        yield Finding("shared memory", "ok" if good else "warn", f"{free:.1f} GiB free in /dev/shm", remedy)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    good = soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES
    remedy = "" if good else f"ulimit -n {MIN_OPEN_FILES} (the hard limit is {hard})"
    yield Finding("open files", "ok" if good else "warn", f"ulimit -n is {soft}", remedy)


# --- model, data, accounts -------------------------------------------------------------------------------------------


def check_models(config: Config) -> Iterator[Finding]:
    """Each tower's checkpoint: a folder, in the cache, or to be reached at the hub."""
    model = config.model
    names = {model.audio_model or model.model_name, model.text_model or model.model_name}
    for name in sorted(names):
        yield _check_model(name)


def _check_model(name: str) -> Finding:
    label = f"model {name}"
    if Path(name).expanduser().exists():
        return ok(label, "on this disk")
    from huggingface_hub import constants, try_to_load_from_cache

    cache = Path(constants.HF_HUB_CACHE)
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return ok(label, f"in the cache {cache}")
    if constants.HF_HUB_OFFLINE:
        remedy = "unset HF_HUB_OFFLINE, or download on another machine and set HF_HOME"
        return Finding(label, "fail", f"not in the cache {cache}, and HF_HUB_OFFLINE is set", remedy)
    try:
        address = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=REACH_S).close()
    except urllib.error.HTTPError as error:
        remedy = "check the name; for a gated model accept its terms on the hub and set HF_TOKEN"
        return Finding(label, "fail", f"{constants.ENDPOINT} answers {error.code}", remedy)
    except (OSError, ValueError) as error:
        remedy = "check network and proxy, set HF_ENDPOINT to a mirror, or --model_name to a folder"
        return Finding(label, "fail", f"{constants.ENDPOINT} is out of reach ({error})", remedy)
    disk = check_disk("", cache, MIN_CACHE_GIB, "HF_HOME")
    return Finding(label, disk.state, f"to be downloaded into {cache}; {disk.found}", disk.remedy)


def check_data(settings: DataSettings) -> Iterator[Finding]:
    """The first records of each sample file, with their audio."""
    defaults = DataSettings()
    for name in ("train_samples_path", "test_samples_path", "dev_samples_path", "glossary_path"):
        path = getattr(settings, name)
        if path is None:
            continue
        try:
            file = find_file(path, settings.data_root, f"--{name}")
            found = "there" if name == "glossary_path" else _sample(file, settings)
            yield ok(name, f"{file}: {found}")
        except ValueError as error:
            state: State = "warn" if path == getattr(defaults, name) else "fail"
            yield Finding(name, state, str(error), f"set --{name}, --data_root, --audio_root or --path_remap OLD=NEW")


def _sample(file: Path, settings: DataSettings) -> str:
    """The first records through the real reader; ValueError when one of them cannot be used."""
    records = [record for _, record in itertools.islice(iterate_records(file), NUM_SAMPLED)]
    said = []
    for root in (settings.audio_root,) if settings.audio_root else (str(file.parent), settings.data_root):
        with tempfile.TemporaryDirectory() as folder:
            few = Path(folder) / file.name
            few.write_text(json.dumps(records), encoding="utf-8")
            drops = DropLog(1.0)
            try:
                clips = list(load_clips(few, replace(settings, audio_root=root), drops))
            except ValueError:  # no clip of them at all: the counts tell why
                clips = []
        bad = [str(problem) for problem in _read_problems(clips, AudioReader(0))]
        if clips and not bad and not drops.counts:
            return f"the first {len(clips)} clips can be read"
        said.append(f"audio under {root}: {len(bad)} unreadable {bad[:2]}, {drops.summary()}")
    raise ValueError(f"{file}: of the first {len(records)} records, {'; '.join(said)}")


def _read_problems(clips: Iterable, reader: AudioReader) -> Iterator[Exception]:
    for clip in clips:
        try:
            reader.read(clip.audio_path, clip.start_s, clip.end_s)
        except Exception as error:
            yield error


def check_accounts() -> Iterator[Finding]:
    """Modal's token, and which secrets there are. Never a value."""
    has_token = bool(os.environ.get("MODAL_TOKEN_ID") and os.environ.get("MODAL_TOKEN_SECRET"))
    where = "in the environment" if has_token else "~/.modal.toml"
    has_token = has_token or (Path.home() / ".modal.toml").exists()
    has_package = importlib.util.find_spec("modal") is not None
    said = f"package {'there' if has_package else 'missing'}, token {where if has_token else 'missing'}"
    remedy = "" if has_token and has_package else "for runs on Modal: pip install 'modal>=1.6,<2', then modal setup"
    yield Finding("Modal", "ok" if not remedy else "warn", said, remedy)
    present = sorted(set(secret_values().values()))
    yield ok("secrets", f"set: {', '.join(present) or 'none'}")


# --- all of it -------------------------------------------------------------------------------------------------------


def look_over(config: Config) -> list[Finding]:
    wants_gpu = config.distributed.device == "cuda" or (
        config.distributed.device == "auto" and needed_gib(config, 1) is not None
    )
    checks: list[Callable[[], Iterable[Finding]]] = [
        lambda: [ok("Python", f"{platform.python_version()} on {platform.platform()}")],
        lambda: check_gpu_software(wants_gpu),
        check_kernels,
        lambda: check_trackers(config),
        lambda: check_gpus(config),
        lambda: [check_disk("disk of runs", Path(config.run.runs_dir), MIN_DISK_GIB, "--runs_dir")],
        check_limits,
        lambda: check_models(config),
        lambda: check_data(config.data),
        check_accounts,
    ]
    return [finding for check in checks for finding in check()]


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    try:
        config = parse([word for word in argv if word != "--json"])
    except ValueError as error:
        return tell_error("bin/doctor.py", error)
    findings = look_over(config)
    failed = any(f.state == "fail" for f in findings)
    if as_json:
        print(redact(json.dumps({"healthy": not failed, "findings": [asdict(f) for f in findings]}, indent=1)))
    else:
        for f in findings:
            print(redact(f"{f.state:5s} {f.name:20s} {f.found}" + (f"\n{'':26s} -> {f.remedy}" if f.remedy else "")))
        print("something would stop the run" if failed else "nothing stands in the way of a run")
    return int(failed)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


if __name__ == "__main__":
    sys.exit(main())
