"""bin/retrieve.py on files of any length and on live audio; lines, JSON Lines, a table; faults of single files."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from rich.console import Console

from bin.retrieve import Sightings, as_line, as_table, main
from retrieval.matches import Match
from retrieval.retriever import Retriever
from tests.bin.tones import ROOT, environment
from tests.retrieval.small_models import tone


def match(term: str, score: float, start_s: float, end_s: float) -> Match:
    return Match(score, term, term.title(), {"zh": ["键", "锁"]}, start_s, end_s)


@pytest.fixture
def flags(trained: Path, tones: Path) -> list[str]:
    return ["--model", str(trained), "--glossary", str(tones / "glossary.json"), "--device", "cpu"]


@pytest.fixture
def signal() -> np.ndarray:
    return np.concatenate([tone(300 + 400 * (i % 6), 0.7, seed=i) for i in range(16)])


@pytest.fixture
def stream_terms(trained: Path, tones: Path, signal: np.ndarray) -> Callable[..., set[str]]:
    """What a stream of the library hears over the whole signal."""

    def listen(**settings: float) -> set[str]:
        retriever = Retriever.load(trained)
        retriever.index(tones / "glossary.json")
        stream = retriever.stream(**settings)  # type: ignore[arg-type]
        heard: set[str] = set()
        for start in range(0, len(signal), 15_360):
            stream.accept(signal[start : start + 15_360])
            heard |= {m.term for m in stream.query()}
        stream.finish()
        return heard | {m.term for m in stream.query()}

    return listen


def test_terms_come_and_go_once_with_their_best_score_and_whole_time() -> None:
    sightings = Sightings()
    first, better = match("key", 0.5, 0.0, 1.92), match("key", 0.7, 0.96, 2.88)
    assert sightings.update([first]) == ([first], [])
    assert sightings.update([better]) == ([], [])
    assert sightings.update([]) == ([], [match("key", 0.7, 0.0, 2.88)])
    assert sightings.update([first]) == ([first], []), "heard again later, it is told again"


def test_a_line_and_a_table_tell_everything() -> None:
    assert as_line(match("pound key", 0.7123, 0.96, 2.88)) == "    0.96     2.88  0.712  Pound Key  [zh 键, 锁]"
    console = Console(file=io.StringIO(), width=100)
    console.print(as_table([match("pound key", 0.7123, 0.96, 2.88)], 3.0))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("3.0 s", "0.712", "Pound Key", "键, 锁", "0.96 - 2.88"):
        assert part in shown


def test_several_files_side_by_side(
    flags: list[str], signal: np.ndarray, stream_terms: Callable[..., set[str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sf.write(tmp_path / "long.wav", signal, 16_000)
    sf.write(tmp_path / "short.flac", tone(500, 0.4), 16_000)
    files = [str(tmp_path / "long.wav"), str(tmp_path / "short.flac")]
    assert main([*files, *flags, "--json", "--k", "2"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    of_long = [one for one in told if one["file"] == files[0]]
    assert {one["term"] for one in of_long} == stream_terms(k=2)
    assert {one["file"] for one in told} == set(files)
    assert all(0 <= one["start_s"] < one["end_s"] <= len(signal) / 16_000 for one in of_long)
    assert [one["end_s"] for one in told if one["file"] == files[1]] == [0.4, 0.4]


def test_one_bad_file_does_not_stop_the_others(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sf.write(tmp_path / "good.wav", tone(500, 2.0), 16_000)
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    assert main([str(tmp_path / "bad.wav"), str(tmp_path / "good.wav"), *flags, "--k", "1"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("good.wav")
    assert "1 of 2 files could not be read" in err
    assert "bad.wav: not_audio" in err


@pytest.mark.parametrize("more", [[], ["a.wav", "--mic"]])
def test_files_or_live_audio(flags: list[str], more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*more, *flags]) == 2
    assert "allowed: files, or --mic" in capsys.readouterr().err


def test_live_audio_on_standard_input(
    flags: list[str], signal: np.ndarray, stream_terms: Callable[..., set[str]]
) -> None:
    """Through a real pipe, in pieces that cut samples in two."""
    command = [sys.executable, str(ROOT / "bin" / "retrieve.py"), "--mic", "--json", "--k", "2", *flags]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        raw = signal.astype("<i2").tobytes()
        for start in range(0, len(raw), 9_999):
            program.stdin.write(raw[start : start + 9_999])
            program.stdin.flush()
        program.stdin.close()
        told = [json.loads(line) for line in program.stdout]
        assert program.wait(60) == 0
    assert "file" not in told[0]
    every_window = stream_terms(k=2, lookback=0.96)
    assert {one["term"] for one in told} <= every_window
    assert len(told) >= 2
