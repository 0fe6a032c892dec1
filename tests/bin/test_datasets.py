"""The data of a run: what is ranked, what counts as seen, what leaks, what is dropped and who says so.

Drops joined over real ranks are in test_evaluation.py.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf
import torch

import bin.datasets
from bin.datasets import load_datasets, merge_drops
from data.drops import DropLog
from data.settings import DataSettings
from distributed.processes import World
from tests.bin.tones import TERMS, write_samples

ALONE = World(0, 1, 0, torch.device("cpu"), "none", 0)


@pytest.fixture
def settings(tones: Path, tmp_path: Path) -> DataSettings:
    return DataSettings(
        train_samples_path=str(tones / "train.json"),
        test_samples_path=str(tones / "test.json"),
        check_cache_path=str(tmp_path / "checks.jsonl"),
    )


def write_prompts(folder: Path, audio: Path, text: str = "press the operator key") -> str:
    """A word file of one prompt, whose words are spread over the audio."""
    duration_s = sf.info(audio).duration
    words = text.split()
    each_s = duration_s / len(words)
    timed = [{"word": w, "start": i * each_s, "end": (i + 1) * each_s} for i, w in enumerate(words)]
    prompt = {"id": f"prompt of {audio.name}", "audio": str(audio), "duration_s": duration_s, "words": timed}
    (folder / "words.jsonl").write_text(json.dumps(prompt) + "\n")
    return str(folder / "words.jsonl")


@pytest.fixture
def prompt_audio(tmp_path: Path) -> Path:
    write_samples(tmp_path, "prompt", 1, seed=8)
    return tmp_path / "prompt_0.wav"


# --- what is ranked, what is seen ------------------------------------------------------------------------------------


def test_without_a_glossary_all_labels_are_ranked(settings: DataSettings) -> None:
    found = load_datasets(settings, ALONE, None)
    assert (len(found.train), len(found.test), found.dev, found.glossary, found.windows) == (24, 10, None, None, None)
    assert found.terms == sorted(TERMS)
    assert found.seen_terms == frozenset(TERMS)
    assert all(clip.duration_s for clip in (*found.train, *found.test)), "headers were read"


def test_labels_of_the_test_that_no_training_clip_has_are_ranked_but_unseen(
    settings: DataSettings, tmp_path: Path
) -> None:
    few = write_samples(tmp_path, "few", 3, seed=9)  # the first three terms
    found = load_datasets(replace(settings, train_samples_path=str(few)), ALONE, None)
    assert found.terms == sorted({*TERMS} - {"extension"})  # which neither file has
    assert found.seen_terms == frozenset(TERMS[:3])


def test_the_glossary_is_ranked_in_its_order_and_labels_that_it_lacks_join_with_a_warning(
    settings: DataSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = ["Parking Lot", *TERMS[:0:-1]]  # all but the first
    (tmp_path / "glossary.json").write_text(json.dumps(entries))
    found = load_datasets(replace(settings, glossary_path=str(tmp_path / "glossary.json")), ALONE, None)
    assert found.terms == ["parking lot", *TERMS[:0:-1], TERMS[0]]
    assert found.seen_terms == frozenset(TERMS), "a term of the glossary alone is not seen"
    assert f"1 labels are not in the glossary and join it for evaluation: ['{TERMS[0]}']" in caplog.text


def test_a_glossary_with_all_labels_gives_no_warning(
    settings: DataSettings, tones: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = load_datasets(replace(settings, glossary_path=str(tones / "glossary.json")), ALONE, None)
    assert found.terms == [*TERMS, "parking lot", "hash key"]
    assert "labels" not in caplog.text


def test_terms_that_a_window_may_hold_are_seen(settings: DataSettings, prompt_audio: Path, tmp_path: Path) -> None:
    few = write_samples(tmp_path, "few", 2, seed=9)
    (tmp_path / "glossary.json").write_text(json.dumps([*TERMS[1:], "operator", "hash key"]))
    windowed = replace(
        settings,
        train_samples_path=str(few),
        glossary_path=str(tmp_path / "glossary.json"),
        word_times_path=write_prompts(tmp_path, prompt_audio, "press the operator mailbox voicemail"),
        window_fraction=1.0,
    )
    found = load_datasets(windowed, ALONE, None)
    assert found.windows is not None
    assert found.windows.possible_terms() == {"operator", "mailbox", "voicemail"}, "of glossary and training clips"
    assert found.seen_terms == {*TERMS[:2], "operator", "mailbox"}
    spelled = load_datasets(replace(windowed, window_words_as_terms=True), ALONE, None)
    assert spelled.seen_terms == {*TERMS[:2], "operator", "mailbox", "press", "the"}
    without = load_datasets(replace(windowed, window_fraction=0.0), ALONE, None)
    assert without.windows is None
    assert without.seen_terms == frozenset(TERMS[:2])


def test_a_dev_file_spares_the_warning_and_its_labels_are_ranked(
    settings: DataSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_datasets(settings, ALONE, None)
    assert "no --dev_samples_path: the test set also steers" in caplog.text
    caplog.clear()
    few, first = write_samples(tmp_path, "few", 1, seed=9), write_samples(tmp_path, "first", 1, seed=11)
    dev = write_samples(tmp_path, "dev", 3, seed=10)
    steered = replace(settings, train_samples_path=str(few), test_samples_path=str(first), dev_samples_path=str(dev))
    found = load_datasets(steered, ALONE, None)
    assert found.dev is not None
    assert [clip.clip_id for clip in found.dev] == ["dev_0", "dev_1", "dev_2"]
    assert found.terms == sorted(TERMS[:3])
    assert "optimistic" not in caplog.text


# --- leaks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test", "dev"])
def test_windows_out_of_measured_audio_are_refused(
    settings: DataSettings, tones: Path, tmp_path: Path, name: str
) -> None:
    measured = {"test": tones / "test_3.wav", "dev": tmp_path / "dev_1.wav"}
    dev = write_samples(tmp_path, "dev", 3, seed=10)
    leaking = replace(
        settings,
        dev_samples_path=str(dev),
        word_times_path=write_prompts(tmp_path, measured[name]),
        window_fraction=1.0,
    )
    with pytest.raises(ValueError, match=rf"1 of \d+ {name} clips have the same audio as training clips"):
        load_datasets(leaking, ALONE, None)
    load_datasets(replace(leaking, window_fraction=0.0), ALONE, None)  # no window is drawn, so nothing leaks


def test_a_copy_of_measured_audio_under_another_name_is_refused(
    settings: DataSettings, tones: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "another name.wav"
    shutil.copyfile(tones / "test_3.wav", copy)
    leaking = replace(settings, word_times_path=write_prompts(tmp_path, copy), window_fraction=1.0)
    with pytest.raises(ValueError, match="1 of 10 test clips have the same audio content as training clips"):
        load_datasets(leaking, ALONE, None)
    load_datasets(replace(leaking, check_leak_content=False), ALONE, None)


def test_dev_clips_in_training_are_refused(settings: DataSettings) -> None:
    with pytest.raises(ValueError, match=r"(?s)24 of 24 dev clips have the same id .*--dev_samples_path"):
        load_datasets(replace(settings, dev_samples_path=settings.train_samples_path), ALONE, None)


# --- drops -----------------------------------------------------------------------------------------------------------


def test_each_file_has_its_own_limit_and_the_list_is_written_first(settings: DataSettings, tmp_path: Path) -> None:
    small = write_samples(tmp_path, "small", 4, seed=3)
    (tmp_path / "small_1.wav").write_bytes(b"")
    bad = tmp_path / "run" / "bad_records.jsonl"
    broken = replace(settings, test_samples_path=str(small), max_bad_fraction=0.1)
    with pytest.raises(ValueError, match=rf"1 of 4 records dropped \(.*\); listed in {bad}: 25.0% is more than"):
        load_datasets(broken, ALONE, bad)
    (line,) = [json.loads(text) for text in bad.read_text().splitlines()]
    assert line["source"] == f"{small}:1"
    found = load_datasets(replace(broken, max_bad_fraction=0.25), ALONE, bad)
    assert len(found.test) == 3
    assert (found.drops.num_dropped, found.drops.num_seen) == (1, 28)


def test_only_rank_0_writes_the_list_and_reads_headers_before_the_others(
    settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = bin.datasets.check_clips

    def check(clips: Any, *rest: Any) -> Any:
        order.append("check")
        return real(clips, *rest)

    monkeypatch.setattr(bin.datasets, "check_clips", check)
    monkeypatch.setattr(bin.datasets, "barrier", lambda: order.append("barrier"))
    load_datasets(settings, replace(ALONE, world_size=2), tmp_path / "bad.jsonl")
    assert order == ["check", "check", "barrier"]
    assert (tmp_path / "bad.jsonl").exists()
    order.clear()
    load_datasets(settings, replace(ALONE, world_size=2, rank=1), tmp_path / "bad of rank 1.jsonl")
    assert order == ["barrier", "check", "check"]
    assert not (tmp_path / "bad of rank 1.jsonl").exists()
    order.clear()
    load_datasets(replace(settings, check_audio=False), replace(ALONE, world_size=2, rank=1), None)
    assert order == []


def test_missing_files_name_their_flag(settings: DataSettings) -> None:
    for field in ("train_samples_path", "test_samples_path", "dev_samples_path", "glossary_path"):
        with pytest.raises(ValueError, match=f"--{field} is 'nowhere.json'"):
            load_datasets(replace(settings, **{field: "nowhere.json"}), ALONE, None)


def test_files_are_looked_for_under_the_data_root(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: DataSettings
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"train_samples_path": "train.json", "test_samples_path": "test.json", "glossary_path": "glossary.json"}
    found = load_datasets(replace(settings, data_root=str(tones), **names), ALONE, None)
    assert found.glossary is not None
    assert (len(found.train), len(found.test), len(found.glossary.terms)) == (24, 10, 8)


def test_a_file_that_loses_its_last_clip_is_named(settings: DataSettings, tmp_path: Path) -> None:
    small = write_samples(tmp_path, "small", 1, seed=3)
    (tmp_path / "small_0.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"--test_samples_path: .*small.json has no usable clip left; 1 of 25 records"):
        load_datasets(replace(settings, test_samples_path=str(small), max_bad_fraction=1.0), ALONE, None)


def test_the_log_says_what_each_file_gave(settings: DataSettings, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_datasets(settings, ALONE, None)
    assert f"train: 24 clips (4 without a term) from {settings.train_samples_path}" in caplog.text
    assert f"test: 10 clips (2 without a term) from {settings.test_samples_path}" in caplog.text


@pytest.fixture
def drops() -> DropLog:
    drops = DropLog(max_bad_fraction=0.5)
    drops.seen(4)
    drops.add("silent", "a.json:0", "x")
    drops.note("too_short", "a.json:1", "'ab'")
    return drops


def test_merging_again_counts_nothing_twice(drops: DropLog, tmp_path: Path) -> None:
    for _ in range(3):
        merge_drops(drops, ALONE, tmp_path / "bad.jsonl")
    assert (drops.counts, drops.notes) == ({"silent": 1}, {"too_short": 1})
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert kinds == ["drop", "note"]


def test_what_other_ranks_dropped_is_added_and_the_limit_holds_for_all(
    drops: DropLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(kind: str, source: str) -> dict[str, str]:
        return {"kind": kind, "reason": "silent", "source": source, "detail": ""}

    of_other = [line("drop", "a.json:0"), line("drop", "a.json:2"), line("note", "a.json:3")]
    monkeypatch.setattr(bin.datasets, "gather_json", lambda own: [own, of_other])
    merge_drops(drops, replace(ALONE, rank=1), tmp_path / "bad.jsonl")
    assert (drops.counts, drops.notes) == ({"silent": 2}, {"too_short": 1, "silent": 1})
    assert not (tmp_path / "bad.jsonl").exists(), "the list is rank 0's"
    of_other.append(line("drop", "a.json:3"))
    with pytest.raises(ValueError, match="3 of 4 records dropped"):
        merge_drops(drops, ALONE, tmp_path / "bad.jsonl")
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 5


def test_a_clean_run_writes_no_list(tmp_path: Path) -> None:
    merge_drops(DropLog(), ALONE, tmp_path / "bad.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_large_glossary_is_looked_up_once(
    settings: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its terms are a list made anew at each look: once a label would take hours at millions of labels."""
    (tmp_path / "glossary.json").write_text(json.dumps([*TERMS, "hash key"]))
    real: Callable[[Any], list[str]] = bin.datasets.Glossary.terms.fget  # type: ignore[attr-defined]
    looks: list[int] = []
    monkeypatch.setattr(bin.datasets.Glossary, "terms", property(lambda self: looks.append(1) or real(self)))
    load_datasets(replace(settings, glossary_path=str(tmp_path / "glossary.json")), ALONE, None)
    assert 0 < len(looks) < len(TERMS)
