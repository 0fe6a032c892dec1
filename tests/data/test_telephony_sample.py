"""What the shipped sample promises in its README, checked from its files alone."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from data.checks import check_clips
from data.clips import load_clips
from data.drops import DropLog
from data.glossary import load_glossary
from data.leaks import refuse_leaks
from data.settings import DataSettings
from data.windows import load_prompts

SAMPLE = Path(__file__).parents[2] / "samples" / "telephony"


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """(train clips, test clips, training prompts); nothing of them may be dropped."""
    drops, settings = DropLog(0.0), DataSettings()
    cache = tmp_path_factory.mktemp("cache") / "checks.jsonl"
    train, test = (
        check_clips(load_clips(SAMPLE / f"{side}.json", settings, drops), drops, cache) for side in ("train", "test")
    )
    prompts = load_prompts(SAMPLE / "words.jsonl", settings, drops)
    drops.check()
    assert not drops.notes
    return train, test, prompts


def test_train_and_test_share_no_audio(sample):
    train, test, prompts = sample
    refuse_leaks(train, test)
    tested = {clip.audio_path for clip in test}
    assert not tested & {prompt.audio_path for prompt in prompts}, "random windows must not come from the test"
    assert not tested & {clip.audio_path for clip in train}


def test_shares_of_the_split(sample):
    train, test, _ = sample
    for is_no_term in (False, True):
        num_train, num_test = (sum(clip.is_no_term is is_no_term for clip in side) for side in (train, test))
        assert num_test > 0
        assert 0.20 <= num_test / (num_train + num_test) <= 0.25


def test_test_terms_are_seen_in_training_or_never_said_there(sample):
    train, test, prompts = sample
    said = [f" {' '.join(prompt.words)} " for prompt in prompts]
    labelled = {term for clip in train for term in clip.terms}
    seen, unseen = set(), set()
    for term in {term for clip in test for term in clip.terms}:
        (seen if any(f" {term} " in text for text in said) else unseen).add(term)
    assert seen <= labelled, "a term that is said in training is labelled there"
    assert not unseen & labelled
    assert len(unseen) >= 0.15 * len(seen | unseen)


def test_texts_of_training_prompts_are_not_in_the_test(sample):
    _, test, prompts = sample
    whole = defaultdict(list)
    for prompt in prompts:
        whole[" ".join(prompt.words)].append(prompt.prompt_id)
    for clip in test:
        covers_prompt = clip.start_s == 0.0 and clip.is_no_term
        assert not (covers_prompt and clip.text in whole), clip.clip_id


def test_the_glossary_holds_every_term(sample):
    train, test, _ = sample
    glossary = load_glossary(SAMPLE / "glossary.json")
    assert {term for clip in (*train, *test) for term in clip.terms} <= set(glossary.terms)


def test_size_and_plain_json():
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 12_000_000
    rows = json.loads((SAMPLE / "test.json").read_text(encoding="utf-8"))
    assert len({row["segment_id"] for row in rows}) == len(rows)
    assert all(not Path(row["term_chunk_audio"]).is_absolute() for row in rows)
