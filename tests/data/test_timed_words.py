"""Tolerance, cut terms and texts are in test_windows.py; here, what only term windows use."""

from dataclasses import replace

import pytest

from data.fields import RecordError
from data.phrases import Found
from data.timed_words import Prompt, stretch


def prompt(words, **changes):
    times = [round(0.5 * at, 3) for at in range(len(words) + 1)]
    fields = {"prompt_id": "p", "audio_path": "p.wav", "duration_s": times[-1], "words": tuple(words)}
    return Prompt(**(fields | {"starts_s": tuple(times[:-1]), "ends_s": tuple(times[1:])} | changes))


def test_others_are_ignored_inside_and_cut_but_not_beyond():
    words = prompt(("new", "york", "or", "york"), speaker="ann", recording="r")
    nested = [Found("york", 1, 1), Found("york harbour", 3, 3)]
    clip = stretch(words, 0.0, 1.2, "c", "s", [Found("new york", 0, 1)], nested, {"new york": "New York"})
    assert (clip.terms, clip.surfaces, clip.ignored) == (("new york",), ("New York",), ("york",))
    assert (clip.speaker, clip.recording, clip.segment_id) == ("ann", "r", "p")


def test_unknown_words_leave_no_trace_in_the_text():
    assert stretch(prompt(("press", "", "key")), 0.0, 1.5, "c", "s", ()).text == "press key"


@pytest.mark.parametrize(
    "changes",
    [
        {"ends_s": (0.5, 0.4)},
        {"starts_s": (0.6, 0.1)},
        {"starts_s": (-0.1, 0.5)},
        {"duration_s": 0.5},
        {"duration_s": float("nan")},
        {"begin_s": 4.0},
        {"begin_s": 0.2},
        {"words": (), "starts_s": (), "ends_s": ()},
    ],
)
def test_times_that_do_not_go_forward(changes):
    prompt(("a", "b")).check()
    with pytest.raises(RecordError, match="do not go forward"):
        replace(prompt(("a", "b")), **changes).check()
