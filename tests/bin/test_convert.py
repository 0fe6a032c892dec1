"""Conversions of the shipped sample and of a folder of TextGrids, each read back."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from bin.convert import main
from data.clips import load_clips
from data.drops import DropLog
from data.settings import InputSettings

SAMPLE = Path(__file__).parents[2] / "samples" / "telephony" / "test.json"
GRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
3
<exists>
1
"IntervalTier" "words" 0 3 3
0 1 "pound"
1 1.5 "key"
1.5 3 ""
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(path, **settings):
    drops = DropLog(0.0)
    clips = load_clips(path, InputSettings(**settings), drops)
    drops.check()
    return clips


@pytest.mark.parametrize("output_format", ["term_chunks", "lhotse_cuts", "nemo_manifest"])
def test_the_sample_is_the_same_after_a_conversion(tmp_path, output_format):
    output = tmp_path / "out.jsonl.gz"
    main(["--samples_path", str(SAMPLE), "--output", str(output), "--output_format", output_format])
    before, after = read(SAMPLE), read(output)
    for name in ("clip_id", "audio_path", "text", "terms", "surfaces", "ignored", "is_no_term"):
        assert [getattr(clip, name) for clip in after] == [getattr(clip, name) for clip in before], name
    spans = [(clip.start_s or 0.0, clip.end_s) for clip in before]
    for clip, (start_s, end_s) in zip(after, spans, strict=True):
        assert (clip.start_s or 0.0) == pytest.approx(start_s)
        assert end_s is None or clip.end_s == pytest.approx(end_s, abs=0.051), "ends beyond the file are the file's end"
    assert not (tmp_path / "out.jsonl.gz.bad_records.jsonl").exists()


def test_a_folder_of_textgrids_becomes_samples(tmp_path):
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "a.TextGrid").write_text(GRID)
    sf.write(tmp_path / "aligned" / "a.wav", 0.1 * np.sin(np.arange(48_000)), 16_000)
    (tmp_path / "terms.txt").write_text("pound key\n")
    main(
        [
            *("--samples_path", str(tmp_path / "aligned"), "--glossary-path", str(tmp_path / "terms.txt")),
            *("--output", str(tmp_path / "chunks.jsonl"), "--term_margin_s", "0.5", "--no_term_ratio", "0"),
        ]
    )
    [line] = (tmp_path / "chunks.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["term_chunk_audio_ground_truth_terms"] == ["pound key"]
    assert (record["term_chunk_audio_start"], record["term_chunk_audio_end"]) == (0.0, 2.0)


def test_too_many_drops_stop_it_list_them_and_write_nothing(tmp_path, capsys):
    samples = json.loads(SAMPLE.read_text())[:10]
    for record in samples:
        record["term_chunk_audio"] = str(SAMPLE.parent / record["term_chunk_audio"])
    samples[3]["term_chunk_audio"] = "none.wav"
    (tmp_path / "x.json").write_text(json.dumps(samples))
    arguments = ["--samples_path", str(tmp_path / "x.json"), "--output", str(tmp_path / "out.jsonl")]
    assert main(arguments) == 2
    assert "error: 1 of 10 records dropped (missing 1)" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    [line] = (tmp_path / "out.jsonl.bad_records.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "missing"
    assert main([*arguments, "--max_bad_fraction", "0.1"]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 9


def test_members_of_tars_are_no_files_for_other_programs(tmp_path, capsys):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        audio = next(iter(SAMPLE.parent.rglob("*.ogg")))
        tar.add(audio, "k.ogg")
        (tmp_path / "k.json").write_text(json.dumps({"text": "x", "terms": ["pound key"]}))
        tar.add(tmp_path / "k.json", "k.json")
    arguments = ["--samples_path", str(tmp_path / "s.tar"), "--output", str(tmp_path / "out.jsonl")]
    assert main(arguments) == 0
    assert len(read(tmp_path / "out.jsonl")) == 1
    assert main([*arguments, "--output_format", "lhotse_cuts"]) == 2
    assert "inside_container 1" in capsys.readouterr().err
