import json
from pathlib import Path

import pytest

from bin.split import MakeSettings, main, make
from data.settings import InputSettings

SAMPLE = Path(__file__).parents[2] / "samples" / "telephony" / "train.json"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_parts_share_nothing_hold_everything_and_say_so(tmp_path, capsys):
    folder = tmp_path / "parts"
    arguments = ["make", "--samples_path", str(SAMPLE), "--output_dir", str(folder)]
    assert main([*arguments, "--test_share", "0.2", "--unseen_share", "0.3", "--dev_share", "0.1"]) == 0
    parts = {name: lines(folder / f"{name}.jsonl") for name in ("train", "test", "dev", "withheld")}
    report = json.loads((folder / "split.json").read_text())
    assert {name: report[f"num_{name}"] for name in parts} == {name: len(part) for name, part in parts.items()}
    assert sum(map(len, parts.values())) == len(json.loads(SAMPLE.read_text()))
    assert abs(report["unseen_share"] - 0.3) <= 0.5 / report["num_test_terms"]
    assert all(record["withheld"] for record in parts["withheld"])
    train, test, dev = (str(folder / f"{name}.jsonl") for name in ("train", "test", "dev"))
    assert main(["check", "--train_samples_path", train, "--test_samples_path", test]) == 0
    assert "same samples        0 of" in capsys.readouterr().out
    assert main(["check", "--train_samples_path", train, "--test_samples_path", dev, "--no_same_samples"]) == 0


def test_a_check_of_a_file_with_itself_finds_every_leak_and_exits_with_1(capsys):
    same = ["--train_samples_path", str(SAMPLE), "--test_samples_path", str(SAMPLE)]
    assert main(["check", *same, "--no_same_samples"]) == 1
    assert "same id             391 of 391 test clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_share": 1.0}, "test_share is 1.0; allowed are numbers above 0 and below 1"),
        ({"unseen_share": 0.0}, "unseen_share is 0.0"),
        ({"dev_share": 0.9}, "dev_share is 0.9; allowed are 0 to 0.9"),
        ({"by": "speaker"}, "391 of 391 clips tell no speaker"),
        ({"input": InputSettings(max_bad_fraction=2.0)}, "max_bad_fraction is 2.0"),
    ],
)
def test_what_cannot_be_had_is_an_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(MakeSettings(str(SAMPLE), str(tmp_path / "parts"), **changes))
