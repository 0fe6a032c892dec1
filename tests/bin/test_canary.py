"""Secrets of the environment are in nothing that a run writes or prints, whether it ends well or not."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

import bin.train
from bin import doctor
from bin.config import parse

Flags = Callable[..., list[str]]
CANARIES = {
    "HF_TOKEN": "hf_canaryAAAAAAAA",
    "WANDB_API_KEY": "canaryBBBBBBBBBBBB",
    "MODAL_TOKEN_SECRET": "as-canaryCCCCCCCC",
    "AWS_SECRET_ACCESS_KEY": "canaryDDDDDDDDDDDD",
}


def is_clean(text: str) -> bool:
    return not any(value in text for value in CANARIES.values())


def traces(folder: Path) -> list[str]:
    """Files with a canary in them or in their names."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if any(value.encode() in content or value in path.name for value in CANARIES.values()):
            found.append(str(path))
    return found


def test_the_search_finds_a_canary(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x hf_canaryAAAAAAAA y")
    assert traces(tmp_path) == [str(tmp_path / "log")]


def test_nothing_of_a_whole_run_holds_a_secret(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard on; W&B offline with the real package where it is installed, else its warning."""
    for name, value in {**CANARIES, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["bin/train.py", *flags("--epochs", "1", "--tensorboard")])
    assert bin.train.main() == 0
    assert is_clean("".join(capfd.readouterr()))
    assert (tmp_path / "runs" / "run" / "model_best.pt").exists()
    assert list((tmp_path / "runs" / "run" / "tb").iterdir())
    assert traces(tmp_path) == []


def test_no_error_and_no_status_holds_a_secret(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A library that puts a token into its message, as an address with a login in it does."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)

    def refuse(*args: object) -> None:
        raise OSError(f"401 for https://user:{CANARIES['HF_TOKEN']}@huggingface.co/x")

    monkeypatch.setattr(bin.train, "build_model", refuse)
    monkeypatch.setattr("sys.argv", ["bin/train.py", *flags()])
    assert bin.train.main() == 1
    told = "".join(capsys.readouterr())
    assert "401 for https://user:<HF_TOKEN>@huggingface.co/x" in told
    assert is_clean(told)
    assert "<HF_TOKEN>" in (tmp_path / "runs" / "run" / "status.json").read_text()
    assert traces(tmp_path / "runs") == []


GONE = f"/nowhere/{CANARIES['HF_TOKEN']}"  # as an address with a login in it, but no network is needed


@pytest.mark.parametrize(
    ("program", "argv"),
    [
        ("convert", ["--samples_path", GONE, "--output", "o.jsonl"]),
        ("doctor", ["--preset", "quickstart", "--audio_model", GONE]),
        ("evaluate", [GONE]),
        ("export", [GONE, "--to", "peft", "--output", "o"]),
        ("index", ["show", "--index", GONE]),
        ("mine", [GONE, "--samples_path", GONE]),
        ("pack", ["--samples_path", GONE, "--out", "o"]),
        ("preflight", ["--", "--train_samples_path", GONE]),
        ("retrieve", ["--model", GONE, "--glossary", "g.json", "a.wav"]),
        ("serve", ["--model", GONE, "--glossary", "g.json"]),
        ("split", ["make", "--samples_path", GONE, "--output_dir", "o"]),
        ("train", ["--train_samples_path", GONE]),
    ],
)
def test_no_programs_error_holds_a_secret(
    program: str, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"bin/{program}.py", *argv])
    try:
        code = importlib.import_module(f"bin.{program}").main()
    except SystemExit as stop:
        code = stop.code
    told = "".join(capfd.readouterr())
    assert code == 2, told
    assert "HF_TOKEN" in told  # its name stands in its place
    assert is_clean(told)
    assert traces(tmp_path) == []


def test_the_doctor_shows_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a finding of a library's words, or of the path of a cache."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "look_over", lambda config: [doctor.ok("model", f"cached in /home/{GONE}")])
    for flags in ([], ["--json"]):
        assert doctor.main(flags) == 0
        told = capsys.readouterr().out
        assert "<HF_TOKEN>" in told
        assert is_clean(told)


def test_a_secret_among_the_settings_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    with pytest.raises(ValueError, match="model_name holds the value of HF_TOKEN") as refused:
        parse(["--model_name", f"https://user:{CANARIES['HF_TOKEN']}@huggingface.co/x"])
    assert is_clean(str(refused.value))
