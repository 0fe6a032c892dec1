"""A few inputs of each target at every run (records.py does 100,000), and the harness on readers that are at fault."""

import logging
import time

import pytest
from hypothesis import strategies as st

import tests.fuzz.harness as harness
from tests.fuzz.harness import Target, damaged, fuzz
from tests.fuzz.targets import targets

NUM_INPUTS = 40


@pytest.fixture(scope="module")
def all_targets(tmp_path_factory):
    return {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}


NAMES = [
    *("records", "term_chunks", "chunk_rows", "nemo_manifest", "lhotse_cuts", "gigaspeech", "textgrids", "webdataset"),
    *("word times", "glossary", "object arrays", "old_shards", "packed"),
]


def test_every_target_has_its_test(all_targets):
    assert list(all_targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_hostile_input_is_taken_or_refused_with_a_message(all_targets, name):
    logging.disable(logging.CRITICAL)
    try:
        outcome = fuzz(all_targets[name], NUM_INPUTS, first_seed=3)
    finally:
        logging.disable(logging.NOTSET)
    assert not outcome.faults, outcome.faults
    assert outcome.num_inputs == NUM_INPUTS
    assert outcome.taken, "inputs that are all refused test little"
    assert outcome.refused, "inputs that are all taken test little"


def reader(fault):
    return Target("x", st.integers(0, 100), lambda _: fault())


def crash():
    raise KeyError("oops")


def refuse_silently():
    raise ValueError


def hang():
    time.sleep(2)


@pytest.mark.parametrize(
    ("fault", "name"), [(crash, "KeyError at"), (refuse_silently, "refused without a word"), (hang, "Hang at")]
)
def test_faults_are_seen(monkeypatch, fault, name):
    monkeypatch.setattr(harness, "TIME_LIMIT_S", 0.05)
    outcome = fuzz(reader(fault), 6)
    assert [what for what in outcome.faults if what.startswith(name)], outcome.faults
    assert outcome.num_faults == outcome.num_inputs == 6


def test_a_seed_gives_the_same_inputs():
    seen = []
    target = Target("x", damaged([bytes(range(200))]), lambda content: seen.append(content) or 1)
    for number in (1, 1, 2):
        fuzz(target, 50, number)
    assert seen[:50] == seen[50:100] != seen[100:]
