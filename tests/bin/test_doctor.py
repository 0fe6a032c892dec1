"""Each finding with its remedy, with stand-ins for drivers, GPUs, disks, the hub and accounts."""

import importlib.util
import json
import resource
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bin import doctor
from bin.config import PRESETS, Config, parse
from bin.doctor import Finding
from tests.bin.tones import write_samples

SMI = "| NVIDIA-SMI 550.54  Driver Version: {driver}   CUDA Version: {cuda} |"


def by_name(findings: object) -> dict[str, Finding]:
    return {f.name: f for f in findings}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("smi", "built_for", "sees_gpu", "state", "words"),
    [
        (None, None, False, "fail", "install the NVIDIA driver"),
        (("550", "12.4"), None, False, "fail", "pip install torch from the default index"),
        (("450", "11.0"), "12.8", False, "fail", "update the driver"),
        (("550", "12.4"), "12.8", False, "fail", "CUDA_VISIBLE_DEVICES"),
        (("550", "12.4"), "12.8", True, "ok", ""),
    ],
)
def test_torch_against_the_driver(
    monkeypatch: pytest.MonkeyPatch, smi: tuple | None, built_for: str, sees_gpu: bool, state: str, words: str
) -> None:
    said = None if smi is None else SMI.format(driver=smi[0], cuda=smi[1])
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: said)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_gpu)
    monkeypatch.setattr(torch.cuda, "nccl", SimpleNamespace(version=lambda: (2, 27, 3)))
    found = by_name(doctor.check_gpu_software(wants_gpu=True))
    assert found["driver"].state == state
    assert words in found["driver"].remedy
    assert ("NCCL" in found) == sees_gpu


def test_without_a_wish_for_a_gpu_its_absence_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: None)
    assert by_name(doctor.check_gpu_software(wants_gpu=False))["driver"].state == "ok"


@pytest.mark.parametrize(
    ("capability", "total_gib", "free_gib", "state", "words"),
    [
        ((9, 0), 80, 79, "ok", "fp8 too"),
        ((8, 0), 40, 39, "ok", "no fp8"),
        ((8, 0), 40, 10, "warn", "are needed"),
        ((8, 6), 24, 23, "fail", "need about 31 GiB"),
        ((7, 5), 80, 79, "fail", "no bf16"),
    ],
)
def test_gpus_against_the_settings(
    monkeypatch: pytest.MonkeyPatch, capability: tuple, total_gib: int, free_gib: int, state: str, words: str
) -> None:
    """The published model at 128 clips on one GPU: 16 GiB of towers and 0.12 GiB a clip."""
    properties = SimpleNamespace(name="X", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free_gib * 2**30, total_gib * 2**30))
    (finding,) = doctor.check_gpus(Config())
    assert finding.state == state
    assert words in finding.found
    assert bool(finding.remedy) == (state != "ok")


def test_ranks_that_share_a_gpu_each_have_towers_there(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = doctor.needed_gib(Config(), 1)
    monkeypatch.setenv("EARMARK_RANKS_PER_GPU", "3")
    assert doctor.needed_gib(Config(), 1) == pytest.approx(alone + 2 * doctor.TOWERS_GIB)


MEANT_FOR = {"gpu_24gb": (1, 24), "a100_40gb_x8": (8, 40), "h100_x8": (8, 80), "several_nodes": (32, 40)}  # GPUs, GiB


def test_every_preset_fits_the_gpus_that_it_is_meant_for() -> None:
    """A tenth stays free for fragments, NCCL and clips that are longer than most."""
    assert {p.stem for p in PRESETS.glob("*.toml")} == {*MEANT_FOR, "quickstart"}
    for preset, (gpus, gib) in MEANT_FOR.items():
        needed = doctor.needed_gib(parse(["--preset", preset]), gpus)
        assert needed is not None, preset
        assert 14.4 < needed < 0.9 * gib, (preset, needed)  # 14.4: the frozen towers in bf16, without a language head
    assert doctor.needed_gib(parse(["--preset", "a100_40gb_x8", "--batch_size", "4096"]), 8) > 40


def test_a_tracker_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {f.name: f.state for f in doctor.check_trackers(parse(["--wandb"]))}
    assert states["tensorboard"] == "ok"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [(f.state, f.remedy) for f in doctor.check_trackers(parse(["--wandb"]))] == [
        ("fail", "pip install tensorboard, or --no-tensorboard"),
        ("fail", "pip install wandb, or leave --wandb out"),
    ]
    assert list(doctor.check_trackers(parse(["--no-tensorboard"]))) == []


def test_other_towers_need_a_trial_to_tell() -> None:
    assert doctor.needed_gib(parse(["--preset", "quickstart"]), 1) is None


def test_disks_and_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**29))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    disk = doctor.check_disk("disk", tmp_path / "not" / "yet", 5.0, "--runs_dir")
    assert (disk.state, "0.5 GiB free" in disk.found, "--runs_dir" in disk.remedy) == ("fail", True, True)
    found = by_name(doctor.check_limits())
    assert "--shm-size" in found["shared memory"].remedy
    assert "ulimit -n 4096" in found["open files"].remedy


@pytest.mark.parametrize(
    ("answer", "state", "words"),
    [
        (None, "ok", ""),
        (urllib.error.HTTPError("", 401, "", {}, None), "fail", "HF_TOKEN"),  # type: ignore[arg-type]
        (urllib.error.URLError("no route"), "fail", "HF_ENDPOINT"),
    ],
)
def test_a_model_at_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: Exception | None, state: str, words: str
) -> None:
    def respond(request: object, timeout: float) -> SimpleNamespace:
        if answer is not None:
            raise answer
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(urllib.request, "urlopen", respond)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "MIN_CACHE_GIB", 0.0)
    (finding,) = doctor.check_models(parse(["--model_name", "org/model"]))
    assert finding.state == state
    assert words in finding.remedy


def test_a_model_that_may_not_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (finding,) = doctor.check_models(parse(["--model_name", "org/model"]))
    assert (finding.state, "unset HF_HUB_OFFLINE" in finding.remedy) == ("fail", True)


def test_data_is_read_for_a_sample(tmp_path: Path) -> None:
    write_samples(tmp_path, "train", 4, seed=1)
    write_samples(tmp_path, "test", 4, seed=2)
    (tmp_path / "test_2.wav").write_bytes(b"RIFF")
    flags = ["--train_samples_path", str(tmp_path / "train.json"), "--test_samples_path", str(tmp_path / "test.json")]
    found = by_name(doctor.check_data(parse(flags).data))
    assert found["train_samples_path"].state == "ok"
    assert "first 4 clips can be read" in found["train_samples_path"].found
    assert found["test_samples_path"].state == "fail"
    assert "1 unreadable" in found["test_samples_path"].found
    missing = by_name(doctor.check_data(parse(["--train_samples_path", "nowhere.json"]).data))
    assert missing["train_samples_path"].state == "fail"
    assert missing["test_samples_path"].state == "warn"  # its flag was not given


def test_secrets_are_present_or_not_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    assert "token missing" in by_name(doctor.check_accounts())["Modal"].found
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-canary-0123")
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-canary-0123")
    found = by_name(doctor.check_accounts())
    assert "token in the environment" in found["Modal"].found
    assert "MODAL_TOKEN_SECRET" in found["secrets"].found
    assert "canary-0123" not in str(found)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_exit_code_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    flags = ["--preset", "quickstart", *(["--json"] if as_json else [])]
    for state, code in (("warn", 0), ("fail", 1)):
        finding = Finding("disk", state, "small", "free some")  # type: ignore[arg-type]
        monkeypatch.setattr(doctor, "look_over", lambda config, finding=finding: [finding])
        assert doctor.main(flags) == code
        told = capsys.readouterr().out
        if as_json:
            assert json.loads(told)["findings"][0]["remedy"] == "free some"
            assert json.loads(told)["healthy"] is (code == 0)
        else:
            assert "-> free some" in told
    assert doctor.main(["--preset", "nothing"]) == 2


def test_this_machine_is_looked_over() -> None:
    findings = doctor.look_over(parse(["--preset", "quickstart"]))
    assert {"torch", "driver", "attention", "disk of runs", "train_samples_path", "secrets"} <= set(by_name(findings))
    assert all(f.remedy or f.state == "ok" for f in findings), "a finding without a remedy"
