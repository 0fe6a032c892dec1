"""The whole program on tones: one process and two agree, exports fit, thresholds stay with the model, errors are one
line."""

import json
from collections.abc import Callable
from pathlib import Path

import ir_measures
import pytest

import bin.evaluate
import bin.train
from bin.config import parse as parse_training
from bin.evaluate import evaluate, parse
from bin.threshold import read_threshold
from tests.bin.tones import ROOT, finish, torchrun, write_samples
from tests.retrieval.pages import Page


@pytest.fixture(scope="module")
def run(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training run, with its report, and a file of distractors."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_samples(folder, "dev", 12, seed=3)
    flags = [
        *("--train_samples_path", str(tones / "train.json"), "--test_samples_path", str(tones / "test.json")),
        *("--glossary_path", str(tones / "glossary.json"), "--check_cache_path", str(folder / "checks.jsonl")),
        *("--dev_samples_path", str(folder / "dev.json"), "--seed", "1", "--save_every", "9"),
        *("--audio_model", str(tones / "audio.json"), "--text_model", str(tones / "text.json")),
        *("--trainable", "full", "--proj_dim", "16", "--batch_size", "8", "--lr", "1e-2", "--epochs", "6"),
        *("--runs_dir", str(folder), "--run_name", "run", "--device", "cpu", "--no-tensorboard", "--num_workers", "0"),
    ]
    assert bin.train.train(parse_training(flags)) == 0
    words = [f"zzz word {i}" for i in range(300)]
    (folder / "words.txt").write_text("\n".join([*words, "Mailboxes", "the voicemail", "voicemail"]))
    return folder / "run"


@pytest.fixture
def flags(run: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def build(*more: str) -> list[str]:
        common = ("--distractors", str(run.parent / "words.txt"), "--distractor_sizes", "20", "300")
        output = ("--json", str(tmp_path / "found.json"), "--num_resamples", "50", "--device", "cpu")
        return [str(run / "model_best"), *common, *output, *more]

    return build


def test_training_leaves_a_report_of_its_test(run: Path) -> None:
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    tested = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    recall = next(line["test/recall@10"] for line in tested if "test/recall@10" in line)
    assert f"{recall:.3f}" in page.text
    assert "Training finished" in page.text


def test_one_process_measures_exports_and_reports(run: Path, flags: Callable[..., list[str]], tmp_path: Path) -> None:
    more = ("--trec", str(tmp_path / "trec"), "--beir", str(tmp_path / "beir"), "--report", str(tmp_path / "page.html"))
    found = evaluate(parse(flags("--calibrate", "false_alarm=0.5", "--k", "3", *more)))
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(found))
    assert [size["num_terms"] for size in found["sizes"]] == [8, 28, 308]
    tested = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    test = next(line for line in tested if "test/recall@1" in line)
    for name in ("recall@1", "recall@5", "mrr", "num_terms", "recall@1_seen"):
        assert found["sizes"][0]["metrics"][name] == pytest.approx(test[f"test/{name}"], abs=1e-9)
    assert found["breakdowns"]["training_clips"], "the training file is that of the run"

    threshold = read_threshold(run / "model_best")
    assert threshold is not None
    assert (threshold["target"], threshold["k"], threshold["num_clips"]) == ("false_alarm=0.5", 3, 12)
    assert threshold["samples"].endswith("dev.json")
    assert threshold["false_alarm"] <= 0.5
    assert found["threshold"] == threshold
    again = evaluate(parse([str(run), "--num_resamples", "50", "--device", "cpu"]))  # a run's folder will do
    assert again["threshold"] == threshold
    assert again["sizes"][0]["metrics"] == found["sizes"][0]["metrics"]

    trec = [list(read(str(tmp_path / "trec" / name))) for read, name in (
        (ir_measures.read_trec_qrels, "qrels.trec"), (ir_measures.read_trec_run, "run.trec"))]  # fmt: skip
    for measure, name in ((ir_measures.R @ 5, "recall@5"), (ir_measures.Success @ 1, "hit@1"), (ir_measures.RR, "mrr")):
        outside = ir_measures.calc_aggregate([measure], *trec)[measure]
        assert outside == pytest.approx(found["sizes"][0]["metrics"][name], abs=1e-9)
    assert len((tmp_path / "beir" / "corpus.jsonl").read_text().splitlines()) == 308
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert f"{threshold['value']:.3f}" in page.text
    assert "308" in page.text
    assert "Training loss" in page.text


def test_two_processes_find_what_one_does(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """10 clips in batches of 4: three batches over two ranks. Threshold and table included."""
    more = ("--batch_size", "4", "--term_batch_size", "5", "--calibrate", "precision=0.2")
    alone = evaluate(parse(flags(*more)))
    done = finish(torchrun(flags(*more), ranks=2, program=ROOT / "bin" / "evaluate.py"), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    together = json.loads((tmp_path / "found.json").read_text())
    assert together["run"].pop("world_size") == 2
    assert done.stdout.count("Recall@k, mean over clips") == 1
    alone = json.loads(json.dumps(alone))
    alone.pop("run"), together.pop("run")
    assert together == alone


def test_without_a_run_the_files_are_given(run: Path, tones: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "deeper" / "model"
    moved.parent.mkdir(parents=True)
    (run / "model_best").rename(moved)
    try:
        with pytest.raises(ValueError, match=r"lies in no run directory with a config.toml; set --test_samples_path"):
            evaluate(parse([str(moved), "--device", "cpu"]))
        found = evaluate(
            parse([str(moved), "--device", "cpu", "--test_samples_path", str(tones / "test.json"),
                   "--glossary_path", str(tones / "glossary.json"), "--num_resamples", "5"])
        )  # fmt: skip
    finally:
        moved.rename(run / "model_best")
    assert "training_clips" not in found["breakdowns"]
    assert "recall@1_seen" not in found["sizes"][0]["metrics"]
    assert (moved.parent / "model.evaluation.json").is_file()


@pytest.fixture
def one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def said(*argv: str) -> str:
        monkeypatch.setattr("sys.argv", ["evaluate.py", *argv])
        assert bin.evaluate.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("bin/evaluate.py: error: ")
        assert "Traceback" not in error
        return error

    return said


def test_a_users_error_is_one_line(one_line: Callable[..., str], flags: Callable[..., list[str]], run: Path) -> None:
    assert "allowed: precision=P or false_alarm=R" in one_line(*flags("--calibrate", "recall=1"))
    assert "k: got 0; allowed: 1 or more" in one_line(*flags("--k", "0"))
    assert "distractor_sizes: got [0]" in one_line(*flags("--distractor_sizes", "0"))
    assert "distractor_sizes: got 400, but" in one_line(*flags("--distractor_sizes", "400"))
    assert "--distractors is 'nowhere.txt', and no such file" in one_line(*flags("--distractors", "nowhere.txt"))
    assert "no retriever_config.json" in one_line(str(run / "checkpoints"), "--device", "cpu")
    leak = str(run.parent / "dev.json")
    assert "would be of memory" in one_line(*flags("--train_samples_path", leak))
