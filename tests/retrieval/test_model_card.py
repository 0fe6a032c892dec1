"""The card says what the files say, and nothing else."""

import json
import re
from pathlib import Path

import pytest

from retrieval.model_card import model_card

CONFIG = {
    "format": "earmark-retriever-1",
    "trainable": "lora",
    "proj_dim": 512,
    "fingerprint": "f" * 64,
    "sources": {"audio_tower": "Qwen/Qwen2-Audio-7B-Instruct", "language_model": "Qwen/Qwen2-Audio-7B-Instruct"},
    "info": {"step": 120, "metrics": {"eval/recall@10": 0.8125, "eval/num_term_clips": 64, "eval/num_terms": 96}},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "long-run"
    for name in ("model_best", "model_final"):
        (run / name).mkdir(parents=True)
        config = CONFIG if name == "model_best" else {**CONFIG, "info": {"step": 200}}
        (run / name / "retriever_config.json").write_text(json.dumps(config))
    test = {"test/recall@10": 0.7031, "test/num_term_clips": 50, "test/num_terms": 96, "test/num_clips": 55}
    seen = {"test/recall@10_seen": 0.9, "test/num_term_clips_seen": 20}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps({**test, **seen}) + '\n{"half')
    (run / "config.toml").write_text('[data]\ntest_samples_path = "/x/test.json"\n[train]\nlr = 0.0001\n')
    return run


def test_figures_are_those_of_the_files(run: Path) -> None:
    card = model_card(run / "model_best", "merged")
    assert "long-run" in card
    assert "| recall@10 | 0.8125 |" in card
    assert "| recall@10 | 0.7031 | 0.9000 |" in card
    assert "On `test.json` that steered training, hence optimistic" in card
    assert "- Qwen/Qwen2-Audio-7B-Instruct" in card
    assert "| lr | 0.0001 |" in card
    assert "unseen" not in card


def test_another_model_of_the_run_does_not_borrow_its_figures(run: Path) -> None:
    card = model_card(run / "model_final", "peft")
    assert "No figures were recorded" in card
    assert not re.search(r"0\.7031|0\.8125|recall", card)


def test_a_folder_outside_of_a_run_has_a_card_too(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / "mine"
    alone.parent.mkdir()
    (run / "model_best").rename(alone)
    card = model_card(alone, "audio")
    assert "# Audio-to-term retriever: mine" in card
    assert "| recall@10 | 0.8125 |" in card
    assert "On the set that steered training" in card
    assert "audio_only=True" in card
    assert "## Training" not in card


def test_threshold_and_windows_are_told(run: Path) -> None:
    extra = {"threshold": {"value": 0.61, "k": 10}, "readout": "maxsim", "maxsim_windows": [2, 8], "maxsim_stride": 2}
    (run / "model_best" / "retriever_config.json").write_text(json.dumps({**CONFIG, **extra}))
    card = model_card(run / "model_best", "merged")
    assert "| value | 0.61 |" in card
    assert "| windows | 2, 8 frames, every 2 |" in card
