"""The program that makes the sample, run on made-up prompts."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

PROGRAM = Path(__file__).parents[2] / "samples" / "telephony" / "make.py"
NUM_TERMS, PROMPTS_A_TERM = 10, 3


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("telephony_make", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["telephony_make"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prompts(tmp_path):
    """A folder of 10 terms in 3 prompts each, 10 prompts without a term, and one without word times."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    rows = {"manifest": [], "words": [], "samples": [], "terms": []}
    spoken = [(f"term{t} said{n}", f"term{t}") for t in range(NUM_TERMS) for n in range(PROMPTS_A_TERM)]
    spoken += [(f"nothing here{n}", None) for n in range(10)]
    for number, (text, term) in enumerate(spoken):
        name = f"p{number:02d}"
        sf.write(folder / f"{name}.wav", 0.1 * np.sin(np.arange(8000) / (5 + number)), 16_000)
        words = [{"word": word, "start": 0.1 + 0.2 * k, "end": 0.3 + 0.2 * k} for k, word in enumerate(text.split())]
        rows["manifest"].append({"id": name, "audio": f"{name}.wav", "text": text, "duration_s": 0.5})
        rows["words"].append({"id": name, "words": words})
        rows["samples"].append(
            {
                "segment_id": name if term else f"{name}_no_term_0",
                "term_chunk_text": text,
                "term_chunk_audio_ground_truth_terms": [term] if term else [],
                "partial_terms": [],
                "term_start_time": 0.1,
                "term_end_time": 0.3,
                "extended_start_time": 0.0,
                "extended_end_time": 0.5,
                "term_duration": 0.2,
            }
        )
    rows["manifest"].append({"id": "beep", "audio": "beep.wav", "text": "<beep>", "duration_s": 0.5})
    rows["terms"] = [{"term": f"term{t}"} for t in range(NUM_TERMS)]
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(prompts, out, hash_seed):
    command = [sys.executable, str(PROGRAM), "--prompts", str(prompts), "--out", str(out)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": hash_seed}, check=False
    )


def test_the_json_is_the_same_byte_for_byte_from_run_to_run(prompts, tmp_path):
    for out, hash_seed in (("one", "1"), ("two", "2")):
        done = run(prompts, tmp_path / out, hash_seed)
        assert done.returncode == 0, done.stderr
        assert "left out, no word times: beep" in done.stdout
    for name in ("train.json", "test.json", "glossary.json", "words.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    records = [json.loads((tmp_path / "one" / f"{side}.json").read_text()) for side in ("train", "test")]
    assert sum(map(len, records)) == NUM_TERMS * PROMPTS_A_TERM + 10
    assert len(sf.read(tmp_path / "one" / records[0][0]["term_chunk_audio"])[0]) == 8000


def test_a_folder_that_is_none_gets_a_clear_error(tmp_path):
    done = run(tmp_path, tmp_path / "out", "0")
    assert done.returncode == 1
    assert "terms.jsonl is missing; --prompts must name a folder" in done.stderr
    assert "Traceback" not in done.stderr


def broken(make, prompts, change):
    """The error of the check after `change` moved prompts between the sides of a valid split."""
    terms = [f"term{t}" for t in range(NUM_TERMS)]
    everyone = make.read_prompts(prompts, terms)
    texts = make.choose_test_texts(everyone, terms, 2026)
    train = [one for one in everyone if one.text not in texts]
    test = [one for one in everyone if one.text in texts]
    make.check_split(train, test)
    with pytest.raises(ValueError, match=r"^split: ") as caught:
        make.check_split(*change(train, test))
    return str(caught.value)


def test_splits_that_break_a_promise_are_refused(make, prompts):
    assert "same text" in broken(make, prompts, lambda train, test: ([*train, test[0]], test))
    assert "unseen" in broken(make, prompts, lambda train, test: (train[:1], test))
    assert "of the term chunks" in broken(make, prompts, fewer_test_chunks)


def fewer_test_chunks(train, test):
    """One prompt a term of the test, so that only its size is wrong."""
    one_each = {tuple(sorted(prompt.labels)): prompt for prompt in test}
    return train, list(one_each.values())
