"""All settings of a training run: the rooms' dataclasses composed, presets and files read, flags parsed.

    defaults  <  launch/configs/<preset>.toml (--preset)  <  your own TOML (--config)  <  flags

Every field is a flag without its group's name (`losses.hard_neg_k` is --hard_neg_k), with underscores or dashes. In
TOML, a key may stand at the top level or in its group's table; `{repo}` in a string is this repository's folder:

    batch_size = 64
    [losses]
    hard_neg_k = 20

Unknown keys and wrong types are errors that name the nearest key and what is allowed.
"""

import dataclasses
import difflib
import sys
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from bin.redaction import refuse_secrets
from data.settings import DataSettings
from distributed.settings import DistributedSettings
from lora.settings import LoraSettings
from losses.settings import LossSettings
from model.settings import ModelSettings

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "launch" / "configs"


@dataclass
class TrainSettings:
    """The loop: how long, how fast, when to measure, save and stop."""

    epochs: int = 40
    """Passes over the training clips, at most."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0 = as many as the epochs have."""
    batch_size: int = 128
    """Clips in an optimizer step over all GPUs: the contrastive batch times grad_accum_steps."""
    grad_accum_steps: int = 1
    """Micro-batches a step, each with its own contrastive batch of batch_size / grad_accum_steps clips."""
    clips_per_pass: int | Literal["auto"] = 0
    """Clips that a GPU embeds at once, in the mean of passes with as much sound each; more are embedded in several passes, twice, with the same gradient, in less memory (the cached-gradient step). 0: all at once; auto: as many as memory_cap_gib holds."""  # noqa: E501
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    """After the warm-up: cut when Recall@10 stalls, decay to zero along a cosine over all epochs, or stay."""
    pretrained_lr_scale: float = 1.0
    """With trainable=full, towers that start from a checkpoint learn at this multiple of the rate."""
    warmup_fraction: float = 0.05
    """Share of all steps over which the learning rate rises linearly from 0."""
    plateau_factor: float = 0.5
    """What `plateau` multiplies the learning rate with."""
    plateau_patience: int = 1
    """Evaluations without a better Recall@10 that `plateau` lets pass before it cuts."""
    patience: int = 3
    """Evaluations in a row without a better Recall@10 after which the run stops early; 0 = never."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices only."""
    adam_beta2: float = 0.999
    """AdamW's second-moment decay; small batches and short runs like 0.98."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm."""
    flat_optimizer: bool = True
    """Parameters and gradients in one buffer each: one all-reduce and few kernels a step. Off: one by one, slower."""
    center_heads: bool = True
    """At the very start, set the heads' biases so that embeddings average to zero over a few hundred clips."""
    refresh_bank_every: int = 0
    """Steps after which the glossary is embedded again for hard negatives; 0 = at the start of each epoch."""
    bank_terms: int = 0
    """Glossary terms that are embedded each time, drawn anew; 0 = all. Fewer stop training for less long."""
    eval_every: int = 1
    """Epochs between evaluations."""
    eval_batch_size: int = 32
    """Clips or texts a batch in evaluation."""
    save_every: int = 5
    """Epochs between checkpoints; the last epoch always has one."""
    save_every_steps: int = 0
    """Further checkpoints every so many steps, in the middle of epochs too; 0 = none."""
    log_every: int = 10
    """Steps between log lines."""
    seed: int = 0
    """Of weights, order, windows, augmentation and dropout. Same seed, machine and world size: the same bits."""

    def validate(self) -> None:
        """Raise ValueError naming the field, its value and what is allowed."""
        for name in (
            "epochs",
            "batch_size",
            "grad_accum_steps",
            "eval_every",
            "eval_batch_size",
            "save_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: 1 or more")
        for name in (
            "max_steps",
            "patience",
            "plateau_patience",
            "save_every_steps",
            "refresh_bank_every",
            "bank_terms",
            "weight_decay",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: 0 or more")
        if self.clips_per_pass != "auto" and self.clips_per_pass < 0:
            raise ValueError(f"clips_per_pass: got {self.clips_per_pass}; allowed: auto, or 0 or more")
        for name in ("lr", "pretrained_lr_scale", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a finite number above 0")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction: got {self.warmup_fraction}; allowed: 0 up to, not including, 1")
        if not 0 < self.plateau_factor < 1:
            raise ValueError(f"plateau_factor: got {self.plateau_factor}; allowed: above 0 and below 1")
        if not 0 < self.adam_beta2 < 1:
            raise ValueError(f"adam_beta2: got {self.adam_beta2}; allowed: above 0 and below 1")
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"grad_accum_steps: got {self.grad_accum_steps}; allowed: a divisor of batch_size {self.batch_size}"
            )


@dataclass
class RunSettings:
    """Where the run lives and what is reported."""

    runs_dir: str = "runs"
    """Folder of all runs (relative to where you stand)."""
    run_name: str | None = None
    """This run's folder; by default the time of the start, or with --resume auto the newest unfinished run."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the run's newest good checkpoint, if there is one. never: refuse a folder with checkpoints."""
    dry_run: bool = False
    """Check settings, data and model, print what would run, and stop."""
    adapter_keys: Literal["v5", "v4", "both"] = "both"
    """Key names of adapter files: transformers 5, transformers 4 (whose PEFT loads no other), or v5 and adapter_v4/."""
    show_examples: int = 6
    """Test clips shown with their top terms at the end."""
    progress: bool = True
    """Progress bar (only on a terminal)."""
    tensorboard: bool = True
    """Write TensorBoard events to <run>/tb."""
    wandb: bool = False
    """Metrics go to Weights & Biases too, as they do when WANDB_API_KEY is set; without a login: offline."""
    wandb_project: str = "earmark"
    """The project there."""


@dataclass
class Config:
    """Train an audio-to-term retriever: a short chunk of speech in, the glossary terms it names out.

    Try it: torchrun --nproc_per_node=2 bin/train.py --preset quickstart
    """

    preset: str | None = None
    """Name of a preset under launch/configs/ (quickstart, ...); flags win over it."""
    config: str | None = None
    """Your own TOML of settings; wins over the preset, flags win over it."""
    train: TrainSettings = field(default_factory=TrainSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    losses: LossSettings = field(default_factory=LossSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def validate(self) -> None:
        """Check every group; what a group checks when made is checked again, since files and flags change fields."""
        for group_name in GROUPS:
            refuse_secrets(vars(getattr(self, group_name)))
        for group in (self.train, self.data, self.model):
            group.validate()
        for checked_when_made in (self.lora, self.losses, self.distributed):
            dataclasses.replace(checked_when_made)
        passes, layers = self.train.clips_per_pass, self.model.checkpointing
        if passes and layers and (passes, layers) != ("auto", "auto"):
            raise ValueError(
                f"clips_per_pass: got {passes} with checkpointing {'on' if layers is True else layers}; allowed: one "
                "of the two, or auto for both, which takes one. Both compute layers again to save memory, so together "
                "they cost twice; use --no-checkpointing, or --clips_per_pass 0"
            )
        if "auto" in (passes, layers) and self.model.trainable == "full":
            field = "clips_per_pass" if passes == "auto" else "checkpointing"
            raise ValueError(f"{field}: got 'auto' with trainable='full', whose memory is not counted; set it yourself")
        if self.data.window_words_as_terms and not self.data.window_fraction:
            raise ValueError("window_words_as_terms: got True without random windows; set window_fraction above 0 too")


GROUPS = {f.name: f for f in dataclasses.fields(Config) if f.name not in ("preset", "config")}


def parse(argv: Sequence[str] | None = None, quiet: bool = False) -> Config:
    """Settings from the command line.

    Args:
        argv: flags without the program's name; by default those of this process.
        quiet: print nothing on a wrong flag (ranks other than 0), only exit.

    Raises:
        ValueError: a preset, file, key or value that cannot be right.
        SystemExit: --help, or a flag that does not exist.
    """
    argv = _with_values(list(sys.argv[1:] if argv is None else argv))
    config = Config()
    preset, own_file = _peek(argv, "preset"), _peek(argv, "config")
    if preset is not None:
        path = PRESETS / f"{preset}.toml"
        if not path.is_file():
            known = sorted(p.stem for p in PRESETS.glob("*.toml"))
            raise ValueError(
                f"preset: got {preset!r}; allowed: {', '.join(known)} (a TOML of your own goes to --config)"
            )
        apply_file(config, path)
    if own_file is not None:
        apply_file(config, Path(own_file))
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[Config],
        args=argv,
        default=config,
        use_underscores=True,
        console_outputs=not quiet,
        prog="bin/train.py",
    )
    config.validate()
    return config


def apply_file(config: Config, path: Path) -> None:
    """Overlay a TOML file. Raises ValueError with file, key, value and remedy."""
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise ValueError(f"config: {path} does not exist; give a TOML file of settings") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config: {path} is not valid TOML: {error}") from None
    for key, value in values.items():
        if isinstance(value, dict):
            if key not in GROUPS:
                raise ValueError(f"{path}: unknown table [{key}]{_nearest(key, GROUPS)}")
            for inner, inner_value in value.items():
                _set(config, inner, inner_value, f"{path} [{key}]", key)
        else:
            _set(config, key, value, str(path), None)


def _set(config: Config, key: str, value: Any, where: str, group: str | None) -> None:
    name = key.replace("-", "_")
    owners = {f.name: g for g in GROUPS if group in (None, g) for f in dataclasses.fields(getattr(config, g))}
    if name not in owners:
        raise ValueError(f"{where}: unknown key {key!r}{_nearest(name, owners)}")
    owner = getattr(config, owners[name])
    hint = typing.get_type_hints(type(owner))[name]
    setattr(owner, name, _typed(value, hint, f"{where}: {key}"))


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value as the annotation wants it, or ValueError. TOML's integers count as floats, its arrays as tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        first, *others = [a for a in args if a is not type(None)]
        if others and isinstance(value, str):  # a number or bool, or a word in its place
            return _typed(value, others[0], where)
        return _typed(value, first, where)
    if isinstance(value, str):
        value = value.replace("{repo}", str(ROOT))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}; allowed: {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; allowed: an array, as in [{', '.join('...' for _ in args)}]")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise ValueError(f"{where} has {len(value)} entries; allowed: {len(inner)}")
        return tuple(_typed(v, h, where) for v, h in zip(value, inner, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} is {value!r} ({type(value).__name__}); allowed: {hint.__name__}")
    return value


def to_toml(config: Config) -> dict[str, Any]:
    """The resolved settings as tables for a TOML file; fields that are None are left out, as TOML has no null."""
    return {
        name: {
            k: list(v) if isinstance(v, tuple) else v for k, v in vars(getattr(config, name)).items() if v is not None
        }
        for name in GROUPS
    }


def _with_values(argv: list[str]) -> list[str]:
    """A switch that also takes a word (--checkpointing auto) may still stand alone, or as --no-checkpointing."""
    given: list[str] = []
    for i, arg in enumerate(argv):
        if arg == "--no-checkpointing":
            given += ["--checkpointing", "False"]
        elif arg == "--checkpointing" and (i + 1 == len(argv) or argv[i + 1].startswith("-")):
            given += [arg, "True"]
        else:
            given.append(arg)
    return given


def _peek(argv: Sequence[str], name: str) -> str | None:
    """The value of --name among the flags, before they are parsed: it decides their defaults."""
    found = None
    for i, arg in enumerate(argv):
        if arg == f"--{name}" and i + 1 < len(argv):
            found = argv[i + 1]
        elif arg.startswith(f"--{name}="):
            found = arg.split("=", 1)[1]
    return None if found in (None, "None") else found


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(sorted(known))}"
