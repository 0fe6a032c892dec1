from pathlib import Path

import pytest

from data.drops import DropLog
from data.fields import RecordError
from data.formats.source import Source


def test_what_raises_is_dropped_and_the_rest_goes_on(settings, clip):
    source = Source(Path("x.json"), settings, DropLog(1.0))

    def make(where, number):
        if number == 1:
            raise RecordError("bad", "one")
        return [clip(str(number), source=where)] * number

    clips = list(source.convert(((f"x.json:{number}", number) for number in range(4)), make))
    assert [one.source for one in clips] == ["x.json:2", "x.json:2", "x.json:3", "x.json:3", "x.json:3"]
    assert (source.drops.num_seen, source.drops.counts) == (4, {"bad": 1})


def test_the_glossary_is_needed_only_when_it_is_asked_for(settings, glossary):
    with pytest.raises(ValueError, match="have text but no terms; set --glossary_path"):
        _ = Source(Path("x.json"), settings, DropLog()).phrases
    glossary("Pound Key", "ab")
    source = Source(Path("x.json"), settings, DropLog())
    assert source.phrases.surfaces == {"pound key": "Pound Key"}
    assert not source.drops.notes, "the glossary's own faults are not those of the samples"


def test_records_that_are_no_objects_are_dropped_and_labels_come_from_lists_or_the_glossary(
    settings, samples, glossary
):
    glossary("Pound Key", "pound")
    source = Source(
        samples([5, {"terms": ["Star"], "ignored_terms": ["hash"]}, {}, {"terms": 5}]), settings, DropLog(1.0)
    )
    found = []
    assert not list(source.convert_records(lambda _, record: found.append(source.labels(record, "a pound key")) or []))
    assert found == [(["Star"], ["hash"]), (["Pound Key"], ["pound"])]
    assert source.drops.counts == {"not_an_object": 1, "wrong_type": 1}
