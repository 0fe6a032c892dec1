"""The README.md of an exported model: what it is, what was measured, how to use it. Every figure is read from a file.

    retriever_config.json     settings, sources, the figures of this very model on the set that steered training
    <run>/metrics.jsonl       the final test, which a run makes with its best model: quoted for model_best alone
    <run>/config.toml         data files and settings of the training

What is in none of them is not in the card.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

from retrieval.model_files import read_config

USES = {
    "merged": (
        "The checkpoint holds both towers with the adapters folded in, under the key names of Hugging Face "
        "transformers, which loads it as it is. The heads are in `heads.safetensors`.",
        'retriever = Retriever.load("{folder}")\nretriever.index("glossary.json")\nretriever.search("chunk.wav", k=10)',
    ),
    "peft": (
        "`adapter_model.safetensors` is a PEFT adapter for the base model. The heads, which are not PEFT's, are in "
        "`heads.safetensors`.",
        'retriever = Retriever.load("{folder}")\nretriever.index("glossary.json")\nretriever.search("chunk.wav", k=10)',
    ),
    "audio": (
        "The audio tower with the adapters folded in, and the audio head. Terms are embedded by the whole model, and "
        "come as an index.",
        'retriever = Retriever.load("{folder}", audio_only=True)\nretriever.use(TermIndex.load("glossary.index"))\n'
        'retriever.search("chunk.wav", k=10)',
    ),
}
SHOWN = ("recall@1", "recall@5", "recall@10", "recall@20", "recall@100", "mrr", "no_term_auroc")
SUBSETS = {"": "all terms", "_seen": "seen in training", "_unseen": "unseen in training"}
DATA_FIELDS = ("train_samples_path", "dev_samples_path", "test_samples_path", "glossary_path")
TRAIN_FIELDS = ("epochs", "batch_size", "lr", "lr_schedule", "seed")


def model_card(model: Path, kind: str) -> str:
    """The text for the export `kind` (merged, peft, audio) of the model folder `model`."""
    config = read_config(model)
    run = model.parent if (model.parent / "metrics.jsonl").is_file() else None
    settings = _toml(model.parent / "config.toml") if run else {}
    about, use = USES[kind]
    sections = [
        _front_matter(config),
        f"# Audio-to-term retriever: {model.parent.name if run else model.name}\n\nA chunk of speech in, the glossary "
        f"terms that it names out: both are embedded in one space of {config['proj_dim']} dimensions. {about}",
        "## Use\n\n```python\nfrom retrieval.retriever import Retriever"
        + (", TermIndex" if kind == "audio" else "")
        + f"\n\n{use.format(folder='path/to/this/folder')}\n```",
        "## Model\n\n" + _table(["", ""], _model_rows(config)),
        "## Measured\n\n" + _measured(model, config, run, settings),
    ]
    if settings:
        sections.append("## Training\n\n" + _table(["", ""], _training_rows(settings)))
    return "\n\n".join(sections) + "\n"


def _front_matter(config: dict[str, Any]) -> str:
    bases = sorted({name for part, name in config["sources"].items() if part in ("audio_tower", "language_model")})
    hub = [name for name in bases if name != "random" and not Path(name).expanduser().exists() and "/" in name]
    lines = ["---", "tags: [speech, retrieval, terminology, audio-text]"]
    if hub:
        lines += ["base_model:", *(f"- {name}" for name in hub)]
    return "\n".join([*lines, "---"])


def _model_rows(config: dict[str, Any]) -> list[list[str]]:
    rows = [
        ["audio tower", config["sources"]["audio_tower"]],
        ["text tower", config["sources"]["language_model"]],
        ["trained", {"lora": "LoRA adapters and heads", "full": "everything"}.get(config["trainable"], "")],
        ["read-out", config.get("readout", "mean")],
        ["embedding size", str(config["proj_dim"])],
        ["fingerprint", config.get("fingerprint", "")],
    ]
    if config.get("readout") == "maxsim":
        frames = ", ".join(map(str, config["maxsim_windows"]))
        rows.insert(4, ["windows", f"{frames} frames, every {config['maxsim_stride']}"])
    info = config["info"]
    rows += [[name, f"{info[name]:g}"] for name in ("step", "epoch") if name in info]
    return [row for row in rows if row[1]]


def _measured(model: Path, config: dict[str, Any], run: Path | None, settings: dict[str, Any]) -> str:
    data = settings.get("data", {})
    blocks = []
    own = config["info"].get("metrics") or {}
    if own:
        steering = data.get("dev_samples_path") or data.get("test_samples_path")
        of = f"`{Path(steering).name}`" if steering else "the set"
        blocks.append(f"On {of} that steered training, hence optimistic:\n\n" + _figures(own, "eval/"))
    if run is not None and model.name == "model_best":
        last = [line for line in _json_lines(run / "metrics.jsonl") if "test/num_clips" in line]
        if last:
            tested = f"`{Path(data['test_samples_path']).name}`" if data.get("test_samples_path") else "the test set"
            blocks.append(f"Test at the end of the run, on {tested}:\n\n" + _figures(last[-1], "test/"))
    threshold = config.get("threshold")
    if threshold:
        blocks.append("Calibrated threshold:\n\n" + _table(["", ""], [[k, _shown(v)] for k, v in threshold.items()]))
    return "\n\n".join(blocks) or "No figures were recorded with this model."


def _figures(numbers: dict[str, Any], prefix: str) -> str:
    """One column a subset of terms, one row a metric."""
    subsets = [suffix for suffix in SUBSETS if numbers.get(f"{prefix}num_term_clips{suffix}")]
    rows = []
    for name in SHOWN:
        cells = [numbers.get(f"{prefix}{name}{suffix}") for suffix in subsets]
        if any(cell is not None for cell in cells):
            rows.append([name, *("" if cell is None else f"{cell:.4f}" for cell in cells)])
    rows.append(["clips", *(str(numbers[f"{prefix}num_term_clips{suffix}"]) for suffix in subsets)])
    rows.append(["terms ranked", *(str(numbers[f"{prefix}num_terms"]) for _ in subsets)])
    return _table(["", *(SUBSETS[suffix] for suffix in subsets)], rows)


def _training_rows(settings: dict[str, Any]) -> list[list[str]]:
    data, train = settings.get("data", {}), settings.get("train", {})
    rows = [[name, f"`{Path(data[name]).name}`"] for name in DATA_FIELDS if data.get(name)]
    return rows + [[name, _shown(train[name])] for name in TRAIN_FIELDS if name in train]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML ({error}); the model card reads the run's settings from it") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a killed run may have left half of one."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
