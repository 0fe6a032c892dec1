import json

import pytest

from data.drops import DropLog
from data.leaks import refuse_leaks
from data.settings import DataSettings
from data.windows import MARGIN_S, Prompt, Windows, load_prompts

WORDS = ("please", "enter", "your", "agent", "number", "then", "press", "the", "pound", "key")
TERMS = ["agent number", "agent", "pound key", "pound", "not there"]


def prompt(words=WORDS, each_s=0.4, name="p"):
    starts = tuple(round(index * each_s, 3) for index in range(len(words)))
    return Prompt(name, "p.wav", len(words) * each_s, words, starts, tuple(start + each_s for start in starts))


def windows(*prompts, **changes):
    return Windows(list(prompts or (prompt(),)), TERMS, DataSettings(**changes))


def test_terms_wholly_inside_are_positives_nested_ones_included():
    clip = windows().clip(0, 1.2, 2.0, "w")  # agent number
    assert clip.text == "agent number"
    assert clip.terms == ("agent", "agent number")
    assert clip.ignored == ()
    assert not clip.is_no_term


def test_a_term_that_the_window_cuts_is_ignored():
    clip = windows().clip(0, 0.8, 1.8, "w")  # your agent num|ber
    assert clip.text == "your agent"
    assert clip.terms == ("agent",)
    assert clip.ignored == ("agent number",)


def test_a_window_between_two_words_of_a_term_cuts_it_too():
    clip = windows().clip(0, 3.2, 3.6, "w")  # pound | key
    assert clip.terms == ("pound",)
    assert clip.ignored == ("pound key",)


def test_twenty_milliseconds_of_tolerance():
    assert windows().clip(0, 1.215, 1.99, "w").text == "agent number"
    assert windows().clip(0, 1.225, 1.99, "w").text == "number"
    assert windows().clip(0, 1.2, 2.015, "w").ignored == (), "a sliver of the next word cuts nothing"


def test_a_term_inside_once_and_cut_once_is_a_positive():
    clip = windows(prompt(("pound", "pound"))).clip(0, 0.0, 0.6, "w")
    assert (clip.terms, clip.ignored) == (("pound",), ())


def test_words_as_terms():
    clip = windows(window_words_as_terms=True).clip(0, 1.9, 3.1, "w")  # (number) then press (the)
    assert set(clip.terms) == {"then", "press"}
    assert set(clip.ignored) >= {"number", "the", "agent number"}


def test_draws_are_a_pure_function_of_seed_epoch_and_index():
    first, second = windows(), windows()
    forward = [first.draw(1, 2, index) for index in range(20)]
    assert [second.draw(1, 2, index) for index in reversed(range(20))] == forward[::-1]
    assert [first.draw(2, 2, index) for index in range(20)] != forward
    assert [first.draw(1, 3, index) for index in range(20)] != forward
    assert len({clip.clip_id for clip in forward}) == 20


def test_draws_keep_to_the_lengths_and_begin_and_end_at_words():
    source = windows(prompt(), prompt(("hello", "world"), name="q"), window_min_s=0.7, window_max_s=2.0)
    for index in range(300):
        clip = source.draw(0, 0, index)
        assert 0.7 <= clip.duration_s <= 2.0 + 2 * MARGIN_S
        assert clip.start_s >= 0
        assert clip.text, "each window holds a whole word"
        nearest = min(abs(clip.start_s - 0.4 * word) for word in range(11))
        assert nearest <= MARGIN_S + 1e-3


def test_every_word_gets_its_turn():
    source = windows(prompt(), prompt(("hello",), name="q"))
    texts = " ".join(source.draw(0, 0, index).text for index in range(300)).split()
    assert set(texts) == {*WORDS, "hello"}


def test_possible_terms_are_those_that_windows_can_have():
    assert windows().possible_terms() == {"agent number", "agent", "pound key", "pound"}
    assert windows(window_words_as_terms=True).possible_terms() == {*WORDS, "agent number", "pound key"}


def test_whole_prompts_show_test_audio_that_windows_would_be_drawn_from(clip, wav):
    path = str(wav("p.wav", seconds=4.0))
    whole = windows(Prompt("p", path, 4.0, ("pound",), (0.0,), (0.4,))).whole_clips()
    with pytest.raises(ValueError, match="same audio as training"):
        refuse_leaks(whole, [clip("t", path, start_s=3.0, end_s=3.5)])


# ---------------------------------------------------------------- the word file


def line(**changes):
    words = [{"word": "Pound", "start": 0.1, "end": 0.4}]
    return {"id": "p", "audio": "a.wav", "duration_s": 0.5, "words": words} | changes


def write(tmp_path, *rows):
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_are_read(tmp_path, settings, wav):
    wav("a.wav")
    [found] = load_prompts(write(tmp_path, line()), settings, DropLog())
    assert found == Prompt("p", str(tmp_path / "a.wav"), 0.5, ("pound",), (0.1,), (0.4,))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"audio": "none.wav"}, "missing"),
        ({"audio": "../../none.wav"}, "outside_root"),
        ({"words": []}, "wrong_type"),
        ({"words": [{"word": "x", "start": 0.1}]}, "bad_words"),
        ({"words": [{"word": 5, "start": 0.1, "end": 0.2}]}, "bad_words"),
        ({"words": [{"word": "x", "start": 0.3, "end": 0.2}]}, "bad_words"),
        ({"words": [{"word": "x", "start": 0.3, "end": 5.0}]}, "bad_words"),
        ({"duration_s": None}, "bad_words"),
    ],
)
def test_bad_lines_are_dropped_and_counted(tmp_path, settings, wav, bad, reason):
    wav("a.wav")
    drops = DropLog()
    assert len(load_prompts(write(tmp_path, line(), line(**bad)), settings, drops)) == 1
    assert drops.counts == {reason: 1}
    with pytest.raises(ValueError, match="no usable prompt"):
        load_prompts(write(tmp_path, line(**bad)), settings, drops)
