"""Settings: users' flags work as written, files overlay in order, and nothing wrong passes in silence."""

import ast
import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest
import tomli_w

from bin.config import GROUPS, PRESETS, ROOT, Config, apply_file, parse, to_toml

# The flags that users bring along, with the values they rely on.
USERS_DEFAULTS = {
    "model_name": "Qwen/Qwen2-Audio-7B-Instruct",
    "audio_text_loss_ratio": 0.3,
    "audio_term_loss_ratio": 0.7,
    "epochs": 40,
    "batch_size": 128,
    "enable_hard_neg": True,
    "lr": 1e-4,
    "hard_neg_k": 10,
    "patience": 3,
    "hard_neg_weight": 0.2,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "glossary_path": None,
    "train_samples_path": "data/xl_term_level_chunks_merged.json",
    "test_samples_path": "data/samples/xl/term_level_chunks_500000_1000000.json",
}


def flat(config: Config) -> dict[str, object]:
    return {name: value for group in GROUPS for name, value in vars(getattr(config, group)).items()}


def test_users_flags_have_their_defaults() -> None:
    found = flat(parse([]))
    assert {name: found[name] for name in USERS_DEFAULTS} == USERS_DEFAULTS


@pytest.mark.parametrize("dash", ["_", "-"])
def test_users_flags_work_as_written_with_either_dash(dash: str) -> None:
    given = {
        "model_name": "x/y", "audio_text_loss_ratio": 0.25, "audio_term_loss_ratio": 0.5, "epochs": 2, "batch_size": 64,
        "lr": 2e-4, "hard_neg_k": 3, "patience": 1, "hard_neg_weight": 0.4, "lora_r": 8, "lora_alpha": 16.0,
        "lora_dropout": 0.0, "glossary_path": "g.json", "train_samples_path": "a.json", "test_samples_path": "b.json",
    }  # fmt: skip
    argv = [text for name, value in given.items() for text in (f"--{name}".replace("_", dash), str(value))]
    argv = [a.replace(dash * 2, "--", 1) if a.startswith(dash * 2) else a for a in argv]
    found = flat(parse([*argv, f"--no-enable{dash}hard{dash}neg"]))
    assert {name: found[name] for name in given} == given
    assert found["enable_hard_neg"] is False


def test_mixed_dashes_as_users_type_them() -> None:
    assert flat(parse(["--no-enable_hard_neg"]))["enable_hard_neg"] is False
    assert flat(parse(["--enable_hard_neg"]))["enable_hard_neg"] is True


def test_every_flag_is_unique_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f.name for group in GROUPS for f in dataclasses.fields(getattr(Config(), group))]
    assert len(names) == len(set(names)), "two groups share a field, so one flag would set either"
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    missing = [name for name in names if f"--{name}" not in shown and f"--no-{name}" not in shown]
    assert not missing, f"--help does not show {missing}"
    for group in GROUPS:
        for field in dataclasses.fields(getattr(Config(), group)):
            assert explained(type(getattr(Config(), group)), field.name), f"{group}.{field.name} has no help text"


def explained(owner: type, name: str) -> bool:
    """Whether a string literal stands below the field, here or where it is inherited from: what --help shows."""
    for kind in owner.__mro__[:-1]:
        body = next(n for n in ast.parse(inspect.getsource(kind)).body if isinstance(n, ast.ClassDef)).body
        for field, after in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == name:
                return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


def test_order_is_defaults_preset_file_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text("batch_size = 24\nlr = 0.5\n\n[losses]\nhard_neg_k = 7\n")
    (tmp_path / "small.toml").write_text("batch_size = 12\nepochs = 3\n")
    monkeypatch.setattr("bin.config.PRESETS", tmp_path)
    config = parse(["--preset", "small", "--config", str(tmp_path / "mine.toml"), "--lr", "0.25"])
    assert (config.train.epochs, config.train.batch_size, config.losses.hard_neg_k, config.train.lr) == (3, 24, 7, 0.25)
    assert config.train.patience == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size = 3\n", "unknown key 'bach_size'; did you mean 'batch_size'?"),
        ("[loses]\nhard_neg_k = 3\n", r"unknown table \[loses\]; did you mean 'losses'?"),
        ("[losses]\nbatch_size = 3\n", "unknown key 'batch_size'"),
        ("batch_size = '3'\n", "batch_size is '3' \\(str\\); allowed: int"),
        ("batch_size = true\n", "batch_size is True \\(bool\\); allowed: int"),
        ("lr_schedule = 'cosin'\n", "lr_schedule is 'cosin'; allowed: 'plateau', 'cosine', 'constant'"),
        ("path_remap = 'a=b'\n", "path_remap is 'a=b'; allowed: an array"),
        ("augment_snr_db = [1.0]\n", "augment_snr_db has 1 entries; allowed: 2"),
        ("batch_size = \n", "is not valid TOML"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        apply_file(Config(), path)


def test_missing_files_and_presets_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preset: got 'quick'; allowed: .*quickstart"):
        parse(["--preset", "quick"])
    with pytest.raises(ValueError, match="does not exist"):
        parse(["--config", str(tmp_path / "none.toml")])


@pytest.mark.parametrize(
    "argv",
    [
        ["--epochs", "0"],
        ["--lr", "nan"],
        ["--lr", "0"],
        ["--batch_size", "10", "--grad_accum_steps", "3"],
        ["--warmup_fraction", "1"],
        ["--plateau_factor", "1"],
        ["--temperature", "0"],
        ["--lora_r", "0"],
        ["--proj_dim", "0"],
        ["--max_bad_fraction", "2"],
        ["--window_words_as_terms"],
    ],
)
def test_impossible_values_name_their_field(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names = [a.removeprefix("--") for a in argv if a.startswith("--")]
    with pytest.raises(
        (ValueError, SystemExit)
    ) as error:  # some groups check when made, which is while flags are parsed
        parse(argv)
    told = str(error.value) + capsys.readouterr().err
    assert names[-1] in told
    assert any(word in told for word in ("allowed", "must be", "set ")), told


def test_an_unknown_flag_stops_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--bach_size", "3"])
    assert stop.value.code == 2
    assert "--batch_size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--bach_size", "3"], quiet=True)
    assert capsys.readouterr() == ("", "")


def test_the_written_settings_read_back(tmp_path: Path) -> None:
    config = parse(["--batch_size", "32", "--path_remap", "a=b", "--dev_samples_path", "d.json"])
    (tmp_path / "config.toml").write_text(tomli_w.dumps(to_toml(config)))
    again = parse(["--config", str(tmp_path / "config.toml")])
    assert flat(again) == flat(config)


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.toml")))
def test_every_preset_is_valid_and_its_files_exist(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a preset works from anywhere
    for value in flat(parse(["--preset", preset])).values():
        if isinstance(value, str) and value.startswith(str(ROOT)):
            assert Path(value).exists(), value


def test_the_two_pass_step_is_refused_beside_checkpointing() -> None:
    assert flat(parse(["--clips_per_pass", "64"]))["clips_per_pass"] == 64
    with pytest.raises(ValueError, match="clips_per_pass: got 64 with checkpointing on"):
        parse(["--clips_per_pass", "64", "--checkpointing"])


def test_checkpointing_is_a_switch_that_also_takes_auto(tmp_path: Path) -> None:
    for argv, expected in (
        ([], False), (["--checkpointing"], True), (["--no-checkpointing"], False),
        (["--checkpointing", "auto"], "auto"), (["--checkpointing", "--epochs", "3"], True),
        (["--checkpointing", "False"], False),
    ):  # fmt: skip
        assert flat(parse(argv))["checkpointing"] == expected
    path = tmp_path / "mine.toml"
    for text, expected in (("true", True), ('"auto"', "auto")):
        path.write_text(f"checkpointing = {text}\nclips_per_pass = 0\n")
        assert flat(parse(["--config", str(path)]))["checkpointing"] == expected
    path.write_text('checkpointing = "sometimes"')
    with pytest.raises(ValueError, match="checkpointing is 'sometimes'; allowed: 'auto'"):
        parse(["--config", str(path)])


def test_auto_is_for_frozen_towers_and_not_for_one_of_two_beside_the_other() -> None:
    both = flat(parse(["--clips_per_pass", "auto", "--checkpointing", "auto", "--memory_cap_gib", "40"]))
    assert (both["clips_per_pass"], both["checkpointing"], both["memory_cap_gib"]) == ("auto", "auto", 40.0)
    for argv in (["--clips_per_pass", "auto", "--checkpointing"], ["--clips_per_pass", "8", "--checkpointing", "auto"]):
        with pytest.raises(ValueError, match=r"clips_per_pass: got .* with checkpointing"):
            parse(argv)
    with pytest.raises(ValueError, match="checkpointing: got 'auto' with trainable='full'"):
        parse(["--checkpointing", "auto", "--trainable", "full"])
    with pytest.raises(ValueError, match="clips_per_pass: got -1; allowed: auto"):
        parse(["--clips_per_pass", "-1"])
