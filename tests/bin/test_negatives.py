"""What is said of a file of mined negatives: of other data, of another model, or out of date."""

import json
from pathlib import Path

import pytest

from bin.negatives import load_negatives
from data.clips import Clip
from data.drops import DropLog
from data.glossary import Entry, Glossary
from data.mined import terms_sha256
from data.settings import DataSettings

GLOSSARY = Glossary("g.json", [Entry(term, term) for term in ("artisan", "modesto", "keypad")])
CLIPS = [Clip(f"clip {i}", f"/x/{i}.wav", None, None, "", (), (), (), True, "test") for i in range(6)]
OURS = {"model_sha256": "m20", "glossary_sha256": terms_sha256(GLOSSARY.terms)}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with the models m10 and m20 of steps 10 and 20."""
    for name, step in (("checkpoints/step-00000010", 10), ("model_final", 20)):
        (tmp_path / "run" / name).mkdir(parents=True)
        config = {"fingerprint": f"m{step}", "info": {"step": step}}
        (tmp_path / "run" / name / "retriever_config.json").write_text(json.dumps(config))
    return tmp_path / "run"


def judge(run_dir: Path, stamp: dict | None, keys: list[str], negs=("modesto",), strict=False):
    path = run_dir.parent / "hard.jsonl"
    lines = ([] if stamp is None else [stamp]) + [{"audio_key": key, "hard_negs": list(negs)} for key in keys]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = DataSettings(hard_neg_jsonl=str(path), hard_neg_strict=strict)
    return load_negatives(settings, CLIPS, GLOSSARY, run_dir, DropLog())


ALL = [clip.clip_id for clip in CLIPS]


def test_a_fresh_file_of_this_run_passes_without_a_word(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = judge(run_dir, OURS, ALL, strict=True)
    assert found.num_matched == 6
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert load_negatives(DataSettings(), CLIPS, GLOSSARY, run_dir, DropLog()) is None


@pytest.mark.parametrize(
    ("stamp", "keys", "doubt"),
    [
        (None, ALL, "no stamp"),
        ({**OURS, "model_sha256": "m10"}, ALL, "stale: mined at step 10, and the run has a model of step 20"),
        ({**OURS, "model_sha256": "other"}, ALL, "none of this run's"),
        ({**OURS, "glossary_sha256": "other"}, ALL, "another glossary"),
        (OURS, ALL[:2], "only 2 of 6"),
    ],
)
def test_doubts_are_warned_about_or_refused(
    run_dir: Path, caplog: pytest.LogCaptureFixture, stamp: dict | None, keys: list[str], doubt: str
) -> None:
    assert judge(run_dir, stamp, keys).num_matched == len(keys)
    assert doubt in caplog.text
    with pytest.raises(ValueError, match=doubt):
        judge(run_dir, stamp, keys, strict=True)


def test_files_of_other_data_are_refused(run_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 1 keys .* is a training clip"):
        judge(run_dir, OURS, ["elsewhere"])
    with pytest.raises(ValueError, match=r"none of the 1 terms .* is in g.json"):
        judge(run_dir, OURS, ALL, negs=["unheard"])
