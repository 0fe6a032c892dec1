import random

import pytest

from data.splits import (
    Heard,
    Split,
    enforce_unseen,
    recording_of,
    split_by,
    unseen_terms,
    withhold_leaks,
)


@pytest.fixture
def corpus(clip):
    """400 clips of 40 recordings and 20 speakers; terms as frequent as words are (a few often, most of them rarely)."""
    draw = random.Random(0)
    terms = [f"{a}{b}ing" for a in "bcdfghjklm" for b in ("ab", "ed", "im", "on", "up")]
    clips = []
    for number in range(400):
        chosen = dict.fromkeys(draw.choices(terms, [1 / (rank + 1) for rank in range(50)], k=draw.randint(0, 3)))
        changes = {"segment_id": f"R{number % 40:03}_S{number:04}", "speaker": f"spk{number % 20}"}
        clips.append(clip(f"c{number}", f"/none/{number}.wav", " ".join(chosen), tuple(chosen), **changes))
    return clips


def names(clips):
    return [clip.clip_id for clip in clips]


def test_a_recording_is_told_or_in_the_id_or_the_file(clip):
    assert recording_of(clip("1", recording="r", segment_id="POD1_S7")) == "r"
    assert recording_of(clip("1", segment_id="POD0000000002_S0000091_term_x")) == "POD0000000002"
    assert recording_of(clip("1", "/x/a.wav", segment_id="seven")) == "/x/a.wav"
    assert recording_of(clip("1", segment_id="call-7-3"), r"^call-(\d+)") == "7"


@pytest.mark.parametrize("by", ["recording", "speaker", "clip"])
def test_no_unit_is_in_both_parts_and_the_share_is_kept(corpus, by):
    split = split_by(corpus, by, 0.2, seed=1)
    unit = {"recording": recording_of, "speaker": lambda c: c.speaker, "clip": lambda c: c.clip_id}[by]
    assert not {unit(clip) for clip in split.train} & {unit(clip) for clip in split.test}
    assert len(split.test) == 80
    assert sorted(names([*split.train, *split.test])) == sorted(names(corpus))
    assert names(split_by(corpus, by, 0.2, seed=1).test) == names(split.test)
    assert names(split_by(corpus, by, 0.2, seed=2).test) != names(split.test)
    shuffled = random.Random(1).sample(corpus, len(corpus))
    assert set(names(split_by(shuffled, by, 0.2, seed=1).test)) == set(names(split.test)), "the order says nothing"


def test_a_split_does_not_follow_the_folder_that_the_data_lie_in(clip):
    def parts(folder):
        clips = [clip(f"c{n}", f"{folder}/{n % 40}/{n}.wav", segment_id="no pattern") for n in range(200)]
        return names(split_by(clips, "recording", 0.3).test)

    assert parts("/here") == parts("/elsewhere/deeper") == parts("/z")


def test_shares_that_whole_units_cannot_give_are_refused(clip):
    clips = [clip(str(n), speaker="ann" if n < 90 else "bob") for n in range(100)]
    assert len(split_by(clips, "speaker", 0.1).test) == 10
    with pytest.raises(ValueError, match=r"test_share is 0.5, 50 clips, but .* the largest \('ann'\) has 90 of 100"):
        split_by(clips, "speaker", 0.5)
    with pytest.raises(ValueError, match="1 of 2 clips tell no speaker, for example test:b"):
        split_by([clip("a", speaker="ann"), clip("b")], "speaker", 0.5)


def test_a_term_is_heard_as_a_label_a_cut_off_label_a_variant_and_in_the_text(clip):
    label = clip("0", terms=("touch tone",), text="")
    for other in (
        clip("1", terms=("Touch-Tones",), text=""),
        clip("2", ignored=("touchtone",), text=""),
        clip("3", text="on a touch-tone phone"),
        clip("4", text="TOUCH TONE'S"),
    ):
        assert Heard([label]).forms(other) == {"touchtone"}
        assert unseen_terms([other], [label]) == (set(), {"touchtone"})
    assert unseen_terms([clip("5", text="a touch of tone")], [label]) == ({"touchtone"}, {"touchtone"})


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_the_share_of_unseen_terms_is_enforced_and_nothing_is_lost(corpus, share):
    before = split_by(corpus, "recording", 0.2)
    split = enforce_unseen(before, share)
    unseen, terms = unseen_terms(split.train, split.test)
    assert abs(len(unseen) - share * len(terms)) <= 0.5
    assert sorted(names([*split.train, *split.test, *(clip for clip, _ in split.withheld)])) == sorted(names(corpus))
    assert not set(names(split.train)) & set(names(split.test))
    assert {reason for _, reason in split.withheld} <= {
        "has a term that is to be unseen",
        "has an unseen term too many",
    }


def test_a_share_that_is_too_high_as_it_comes_is_lowered(clip):
    train = [clip("t", terms=("alpha",), text="")]
    test = [
        clip(str(n), terms=(term,), text="")
        for n, term in enumerate(("alpha", "beta", "gamma", "gamma", "delta", "delta"))
    ]
    split = enforce_unseen(Split(train, test), 0.5)
    assert names(split.test) == ["0", "2", "3", "4", "5"], "beta is the rarest"
    assert [(clip.clip_id, reason) for clip, reason in split.withheld] == [("1", "has an unseen term too many")]


def test_a_share_that_leaves_nothing_to_train_on_is_refused(clip):
    train = [clip("t", terms=("alpha", "beta"), text="")]
    test = [clip(str(n), terms=(term,), text="") for n, term in enumerate(("alpha", "beta"))]
    with pytest.raises(ValueError, match=r"1 of 1 test terms are unseen at best, with 0 of 1 clips left to train on"):
        enforce_unseen(Split(train, test), 0.5)


def test_test_clips_that_leak_are_withheld(clip, wav):
    train = [clip("t1", wav("a.wav"), "press the pound key"), clip("t2", wav("b.wav", hertz=300.0), "hold")]
    test = [
        clip("same id", wav("c.wav", hertz=310.0), "one", segment_id="t1"),
        clip("same text", wav("d.wav", hertz=320.0), "Press the pound-key!"),
        clip("short text", wav("e.wav", hertz=330.0), "hold"),
        clip("copy", wav("f.wav"), "other"),
    ]
    split = withhold_leaks(Split(train, test), ["id", "audio", "audio content", "text"], min_text_words=4)
    assert names(split.test) == ["short text"]
    assert {clip.clip_id: reason for clip, reason in split.withheld} == {
        "same id": "same id as a training clip, test:t1",
        "same text": "same text as a training clip, test:t1",
        "copy": "same audio content as a training clip, test:t1",
    }
    with pytest.raises(ValueError, match="all 1 test clips leak"):
        withhold_leaks(Split(train, test[:1]), ["id"])
