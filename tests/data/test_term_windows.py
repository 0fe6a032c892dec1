import pytest

from data.fields import RecordError
from data.phrases import Phrases
from data.term_windows import MIN_GAP_S, TermWindows
from data.timed_words import Prompt

TERMS = {"new york": "New York", "york": "York", "pound key": "Pound Key"}


def prompt(text, name="p", each_s=0.5, pause_s=0.0, **changes):
    words = tuple("" if word == "?" else word for word in text.split())
    starts = tuple(at * (each_s + pause_s) for at in range(len(words)))
    ends = tuple(start + each_s for start in starts)
    return Prompt(name, f"{name}.wav", ends[-1] + 0.2, words, starts, ends, **changes)


def cut(*prompts, margin_s=1.0, ratio=0.0):
    windows = TermWindows(Phrases(TERMS), margin_s, ratio)
    return [clip for one in prompts for clip in windows.cut(one, "src")], windows


def test_each_longest_match_has_a_window_clipped_to_the_recording():
    clips, _ = cut(prompt("dial for new york or press the pound key"))
    assert [(clip.clip_id, clip.start_s, clip.end_s) for clip in clips] == [
        ("p_term_0", 0.0, 3.0),
        ("p_term_1", 2.5, 4.7),
    ]
    assert clips[0].terms == ("new york",)
    assert clips[0].surfaces == ("New York",)
    assert clips[0].ignored == ("york",)
    assert clips[1].terms == ("pound key",)
    assert clips[0].text == "dial for new york or press"
    assert {clip.segment_id for clip in clips} == {"p"}


def test_a_window_names_the_other_terms_in_it_and_ignores_those_that_it_cuts():
    clips, _ = cut(prompt("new york york pound key"), margin_s=0.75)
    assert clips[0].terms == ("new york", "york")
    assert clips[0].ignored == ("pound key",)
    assert clips[2].terms == ("york", "pound key")
    assert clips[2].ignored == ("new york",)


def test_a_recording_shorter_than_the_margins_is_one_window_with_all_terms():
    [clip], windows = cut(prompt("new york pound key"), margin_s=5.0)
    assert clip.terms == ("new york", "pound key")
    assert windows.num_term == 1


def test_a_term_that_takes_no_time_is_an_error_of_its_recording():
    words = Prompt("p", "p.wav", 5.0, ("new", "york"), (1.0, 1.0), (1.0 + 1e-9, 1.0 + 1e-9))
    with pytest.raises(RecordError, match=r"'new york' takes 0\.0000 s"):
        cut(words, margin_s=0.0)


def test_a_part_of_a_recording_keeps_to_its_bounds():
    part = prompt("new york", begin_s=0.0)
    shifted = Prompt("q", "q.wav", 6.1, part.words, (5.0, 5.5), (5.5, 6.0), begin_s=4.8)
    [clip], _ = cut(shifted)
    assert (clip.start_s, clip.end_s) == (4.8, 6.1)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_windows_without_a_term_keep_the_ratio_and_hold_none(ratio):
    prompts = [prompt("we say nothing here", f"a{n}") for n in range(40)]
    prompts += [prompt("dial for new york please and so on then", f"b{n}") for n in range(40)]
    clips, windows = cut(*prompts, ratio=ratio)
    without = [clip for clip in clips if clip.is_no_term]
    assert (windows.num_term, len(without)) == (40, 40 * ratio)
    assert len({clip.clip_id for clip in clips}) == len(clips)
    for clip in without:
        assert MIN_GAP_S <= clip.duration_s <= 3.0 + 1e-6
        assert "york" not in clip.text
        assert clip.ignored == ()
    lengths = [clip.duration_s for clip in without if clip.audio_path.startswith("a")]
    assert not lengths or min(lengths) == pytest.approx(2.2), "as long as the gap allows"


def test_unknown_words_may_be_terms_so_no_window_without_a_term_has_one():
    clips, windows = cut(prompt("new york ? ? ? ?"), ratio=1.0)
    assert [clip.is_no_term for clip in clips] == [False]
    windows.report("here")


def test_too_few_gaps_are_told(caplog):
    _, windows = cut(prompt("new york"), ratio=3.0)
    windows.report("here")
    assert "here: gaps for 0 windows without a term, not for 3" in caplog.text


def test_the_same_recordings_give_the_same_windows():
    prompts = [prompt("we say nothing here", "a", pause_s=0.3), prompt("new york is far away from here", "b")]
    assert cut(*prompts, ratio=1.0)[0] == cut(*prompts, ratio=1.0)[0]
