"""The comparison's data and table; its runs are those of bin/train.py, which has its own tests."""

import json
from pathlib import Path

import pytest

from bench.readout import choose_owners, split_data, table
from data.clips import load_clips
from data.drops import DropLog
from data.settings import DataSettings
from data.windows import load_prompts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 recordings of 4 speakers, each with a chunk that leaves out its first half second."""
    folder = tmp_path / "speech"
    (folder / "audio").mkdir(parents=True)
    clips, chunks, words = [], [], []
    for i in range(20):
        name, audio = f"r{i}", f"audio/r{i}.flac"
        (folder / audio).touch()
        clips.append({"id": name, "audio": audio, "duration_s": 2.0, "speaker": f"s{i % 4}"})
        words.append({"id": name, "words": [{"word": "term", "start": 0.5, "end": 1.0}]})
        fields = {"term_chunk_text": "a term", "term_chunk_audio_ground_truth_terms": [f"term {i % 3}"]}
        span = {"extended_start_time": 0.5, "extended_end_time": 2.0, "term_start_time": 0.9}
        chunks.append({"segment_id": name, "term_chunk_audio": audio, **fields, **span})
    for name, records in (("manifest", clips), ("samples", chunks), ("words", words)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.parametrize("by", ["clip", "speaker"])
def test_sides_share_nothing_and_keep_their_spans(folder: Path, tmp_path: Path, by: str) -> None:
    split_data(folder, tmp_path, by, 0.3)
    settings = DataSettings(audio_root=str(folder))
    train, test = (load_clips(tmp_path / f"{name}.jsonl", settings, DropLog()) for name in ("train", "test"))
    assert len(train) + len(test) == 20
    assert 0 < len(test) <= 6
    assert {(clip.start_s, clip.end_s) for clip in (*train, *test)} == {(0.5, 2.0)}
    owner = {clip.clip_id: clip.clip_id if by == "clip" else int(clip.clip_id[1:]) % 4 for clip in (*train, *test)}
    assert not {owner[clip.clip_id] for clip in train} & {owner[clip.clip_id] for clip in test}
    prompts = load_prompts(tmp_path / "words.jsonl", settings, DropLog())
    assert {prompt.prompt_id for prompt in prompts} == {clip.clip_id for clip in train}
    assert json.loads((tmp_path / "glossary.json").read_text()) == ["term 0", "term 1", "term 2"]


def test_unknown_voices_are_never_held_out_and_the_choice_is_stable() -> None:
    owners = ["unknown"] * 5 + [f"s{i}" for i in range(95)]
    chosen = choose_owners(owners, 0.2)
    assert len(chosen) == 20
    assert "unknown" not in chosen
    assert chosen == choose_owners(owners[::-1], 0.2)


def test_the_table_shows_mean_and_deviation_of_the_seeds() -> None:
    runs = [
        {"readout": readout, "step_ms": 10.0, "recall@5": 0.5, "recall@10": 0.5, "recall@1": recall}
        for readout, recalls in (("mean", (0.2, 0.4)), ("maxsim", (0.6, 0.6)))
        for recall in recalls
    ]
    shown = table(runs)
    assert "0.300 ± 0.141" in shown
    assert "0.600 ± 0.000" in shown
    assert "unseen" not in shown
