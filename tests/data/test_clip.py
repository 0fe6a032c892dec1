"""How records become clips is in test_clips.py; here, terms and texts that no record should have."""

import pytest

from data.clip import MAX_TEXT_CHARS, make_clip, merged
from data.drops import DropLog
from data.fields import RecordError


def make(written=(), ignored=(), text="", drops=None):
    return make_clip(
        clip_id="c",
        audio_path="a.wav",
        span_s=(None, None),
        text=text,
        written=list(written),
        ignored=list(ignored),
        source="s",
        drops=drops or DropLog(),
    )


@pytest.mark.parametrize(
    "term", ["שלום עולם", "مرحبا", "🎧 mix", "井号键", "e\u0301tude", "\u202eabc", "line\nbreak", "ﬁx"]
)
def test_terms_of_any_script_are_terms(term):
    clip = make([term])
    assert len(clip.terms) == 1
    assert clip.surfaces == (term.strip(),)


def test_a_term_of_3000_characters_is_noted_and_ignored_and_the_clip_stays():
    drops = DropLog()
    clip = make(["word " * 600, "pound key"], drops=drops)
    assert clip.terms == ("pound key",)
    assert len(clip.ignored) == 1
    assert drops.notes == {"term_too_long": 1}
    assert len(drops.lines()[0]["detail"]) < 300


def test_a_text_that_no_clip_can_hold_is_refused():
    make(text="x" * MAX_TEXT_CHARS)
    with pytest.raises(RecordError, match="3001 characters; allowed are 3000"):
        make(text="x" * (MAX_TEXT_CHARS + 1))


def test_merging_keeps_what_either_knows():
    clip = merged(make(["Pound Key"], ["star"]), make(["star", "pound key"], ["hash"]))
    assert clip.terms == ("pound key", "star")
    assert clip.surfaces == ("Pound Key", "star")
    assert clip.ignored == ("hash",)
    assert not merged(make(), make(["star"])).is_no_term
