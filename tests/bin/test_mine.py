"""Mining on tones: right negatives by an independent search, the same bytes after a kill, and training on the file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bin.mine
import bin.train
from bin.config import parse
from data.terms import variant_group
from retrieval.model_files import open_model
from tests.bin.tones import TERMS, environment, finish, torchrun

ROOT = Path(__file__).resolve().parents[2]
Flags = Callable[..., list[str]]
NOUNS = ("gate", "lamp", "wall", "voicemail")
EXTRA = [f"{word} {noun}" for word in ("red", "green", "wide", "tall") for noun in NOUNS]


@pytest.fixture(scope="module")
def trained(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tones: maxsim, as it also covers what the mean needs."""
    folder = tmp_path_factory.mktemp("mined")
    flags = [
        *("--train_samples_path", str(tones / "train.json"), "--test_samples_path", str(tones / "test.json")),
        *("--glossary_path", str(tones / "glossary.json"), "--check_cache_path", str(folder / "checks.jsonl")),
        *("--audio_model", str(tones / "audio.json"), "--text_model", str(tones / "text.json"), "--trainable", "full"),
        *("--proj_dim", "16", "--batch_size", "8", "--lr", "3e-3", "--epochs", "4", "--device", "cpu"),
        *("--runs_dir", str(folder), "--run_name", "run", "--no-tensorboard", "--readout", "maxsim"),
    ]
    assert bin.train.train(parse(flags)) == 0
    return folder / "run"


@pytest.fixture
def glossary(tmp_path: Path) -> Path:
    path = tmp_path / "glossary.json"
    path.write_text(json.dumps([*TERMS[1:], "Voicemails", *EXTRA]))  # "voicemail" itself is a label that it lacks
    return path


def mine_flags(trained: Path, tones: Path, glossary: Path, output: Path, *more: str) -> list[str]:
    paths = ("--samples_path", str(tones / "train.json"), "--glossary_path", str(glossary), "--output", str(output))
    cache = str(output.with_name("checks.jsonl"))
    return [str(trained), *paths, "--check_cache_path", cache, "--num_negatives", "5", "--device", "cpu", *more]


def test_negatives_are_the_hardest_that_may_be_wrong(
    trained: Path, tones: Path, glossary: Path, tmp_path: Path
) -> None:
    output = tmp_path / "hard.jsonl"
    assert bin.mine.main(mine_flags(trained, tones, glossary, output)) == 0
    stamp, *lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert stamp["model_sha256"] == open_model(trained / "model_best").fingerprint
    assert not output.with_name("hard.jsonl.parts").exists()

    records = {r["segment_id"]: r for r in json.loads((tones / "train.json").read_text())}
    assert [line["audio_key"] for line in lines] == list(records)
    surfaces = [*TERMS[1:], "Voicemails", *EXTRA]
    built = open_model(trained / "model_best").built
    for line in lines[::5]:
        own = records[line["audio_key"]]["term_chunk_audio_ground_truth_terms"]
        scores = search_by_hand(built, tones / records[line["audio_key"]]["term_chunk_audio"], [*surfaces, *own])
        best = max((scores[term] for term in own), default=None)
        limit = float("inf") if best is None else best - abs(best) * 0.05
        banned = {variant_group(term) for term in own}
        allowed = [t for t in surfaces if variant_group(t) not in banned and scores[t] <= limit]
        assert line["hard_negs"] == sorted(allowed, key=lambda term: -scores[term])[:5]
    assert any("Voicemails" in line["hard_negs"] for line in lines)


@torch.no_grad()
def search_by_hand(built, audio: Path, terms: list[str]) -> dict[str, float]:
    import soundfile as sf

    from model.packing import AudioPack, TextPack

    wave_S, _ = sf.read(audio, dtype="int16")
    windows = built.model.encode_windows(AudioPack(torch.from_numpy(wave_S), [len(wave_S)])).clips.window_WE
    scores = {}
    for term in terms:
        ids = built.tokenizer([term.lower()])[0]
        embedded_1E = built.model.encode_text(TextPack(torch.tensor(ids), [len(ids)]))
        scores[term] = float((windows @ embedded_1E[0]).max())
    return scores


def test_killed_mining_goes_on_at_another_number_of_processes(
    trained: Path, tones: Path, glossary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clip a part. Killed without warning as soon as some parts are there, then resumed on two processes."""
    program = tmp_path / "small_parts.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport bin.mine\n"
        "bin.mine.TERMS_A_PART, bin.mine.CLIPS_A_PART = 5, 2\nsys.exit(bin.mine.main())\n"
    )
    output, expected = tmp_path / "hard.jsonl", tmp_path / "expected.jsonl"
    monkeypatch.setattr(bin.mine, "TERMS_A_PART", 5)
    monkeypatch.setattr(bin.mine, "CLIPS_A_PART", 2)
    assert bin.mine.main(mine_flags(trained, tones, glossary, expected)) == 0

    parts = tmp_path / "hard.jsonl.parts"
    process = subprocess.Popen(
        [sys.executable, str(program), *mine_flags(trained, tones, glossary, output)], env=environment(), cwd=tmp_path
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and len(list(parts.glob("clips-*"))) < 2:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    num_done = {kind: len(list(parts.glob(f"{kind}-*"))) for kind in ("terms", "clips")}
    assert num_done["terms"] == 5
    assert 2 <= num_done["clips"] < 12, "the kill came too late to test anything"

    other = mine_flags(trained, tones, glossary, output, "--margin", "0.2")
    assert bin.mine.main(other) == 2  # the parts are of another mining
    (parts / ".clips-00011.jsonl.tmp-00ff").mkdir()  # what a kill may leave
    finished = finish(torchrun(mine_flags(trained, tones, glossary, output), 2, program), tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"going on from {sum(num_done.values())} parts" in finished.stdout
    assert output.read_bytes() == expected.read_bytes()
    assert not parts.exists()


def test_training_reads_the_file_and_judges_it(
    trained: Path, tones: Path, glossary: Path, flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "hard.jsonl"
    assert bin.mine.main(mine_flags(trained, tones, tones / "glossary.json", output)) == 0
    losses = {}
    for name, more in {"without": [], "with": ["--hard_neg_jsonl", str(output)]}.items():
        settings = ["--run_name", name, "--max_steps", "1", "--tower_dropout", "0", "--no-center_heads", *more]
        assert bin.train.train(parse(flags(*settings))) == 0
        lines = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = next(line for line in lines if "train/loss" in line)
    assert "none of this run's" in capsys.readouterr().out
    assert losses["with"]["train/bank_refresh_s"] > 0
    # More columns to be told from: both losses that see them rise, and the one over texts stays.
    assert losses["with"]["train/loss_audio_term"] > losses["without"]["train/loss_audio_term"] + 1e-4
    texts = [losses[name]["train/loss_audio_text"] for name in ("with", "without")]
    assert texts[0] == pytest.approx(texts[1], abs=1e-6)

    with pytest.raises(ValueError, match="hard_neg_strict"):
        bin.train.train(parse(flags("--run_name", "strict", "--hard_neg_jsonl", str(output), "--hard_neg_strict")))
    lines = output.read_text().splitlines()
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("\n".join(line.replace('"audio_key": "', '"audio_key": "other_') for line in lines) + "\n")
    with pytest.raises(ValueError, match="none of the 24 keys"):
        bin.train.train(parse(flags("--run_name", "foreign", "--hard_neg_jsonl", str(foreign))))
