"""The program: packs, finds its work done, verifies, and its folder trains as the loose files do."""

import io
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import bin.train
from bin.config import parse
from bin.pack import _Bar, main
from tests.bin.test_train import metrics

Flags = Callable[..., list[str]]


@pytest.fixture
def packed(tones: Path, tmp_path: Path) -> Path:
    for name in ("train", "test"):
        assert main(["--samples_path", str(tones / f"{name}.json"), "--out", str(tmp_path / name)]) == 0
    return tmp_path


def test_it_packs_once_and_verifies(packed: Path, tones: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--out", str(packed / "train")]
    assert main([*flags, "--samples_path", str(tones / "train.json"), "--num-workers", "2"]) == 0
    assert main([*flags, "--verify"]) == 0
    assert "all files are as packed" in capsys.readouterr().out
    shard = packed / "train" / "shard-00000.pcm"
    shard.write_bytes(b"\0\0" + shard.read_bytes()[2:])
    assert main([*flags, "--verify"]) == 1
    assert "shard-00000.pcm: the content is not what was packed" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_shows_rate_and_time_left_on_a_terminal_alone(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("bin.pack.console", Console(file=out, force_terminal=terminal, width=140))
    with _Bar("pack", "clips") as bar:
        bar.show(500, 1_000)  # by an earlier run
        time.sleep(0.05)
        bar.show(600, 1_000)
    if not terminal:
        assert out.getvalue() == ""
        return
    last = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines() if line.strip()][-1]
    shown = re.search(r"600 of 1,000 clips  ([\d,]+)/s \d:\d\d:\d\d left 0:00:0\d", last)
    assert shown, last
    assert 0 < int(shown[1].replace(",", "")) <= 2_000, "100 clips in 0.05 s or somewhat more"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "samples_path: give the samples file to pack"),
        (["--samples_path", "absent.json"], "--samples_path is 'absent.json', and no such file was found"),
        (["--samples_path", "x", "--shard_mb", "0"], "shard_mb is 0; allowed are 1 and above"),
        (["--verify"], "manifest.json: cannot be read"),
    ],
)
def test_what_cannot_be_is_one_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err


def test_training_on_packed_folders_gives_the_losses_of_the_loose_files(
    packed: Path, flags: Flags, tmp_path: Path
) -> None:
    folders = ["--train_samples_path", str(packed / "train"), "--test_samples_path", str(packed / "test")]
    for name, more in (("loose", []), ("packed", folders)):
        assert bin.train.train(parse(flags("--run_name", name, "--augment_band", "0.5", *more))) == 0
    loose, from_packed = tmp_path / "runs" / "loose", tmp_path / "runs" / "packed"
    for key in ("train/loss", "test/recall@1"):
        assert metrics(loose, key) == metrics(from_packed, key)


def test_a_packed_training_set_that_holds_test_audio_is_refused(packed: Path, flags: Flags, tones: Path) -> None:
    """By content, though every id and path differs."""
    copy = packed / "copy"
    copy.mkdir()
    (copy / "x.wav").write_bytes((tones / "train_3.wav").read_bytes())
    (copy / "test.json").write_text(
        '[{"segment_id": "other", "term_chunk_audio": "x.wav", "term_chunk_text": "",'
        ' "term_chunk_audio_ground_truth_terms": ["keypad"]}]'
    )
    train = ["--train_samples_path", str(packed / "train"), "--test_samples_path"]
    for leaked, kind in ((copy / "test.json", "samples"), (tones / "train.json", "id"), (packed / "train", "id")):
        with pytest.raises(ValueError, match=f"have the same {kind} as training clips"):
            bin.train.train(parse(flags(*train, str(leaked), "--run_name", kind[:2])))
