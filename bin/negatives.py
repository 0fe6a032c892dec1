"""The mined negatives of a run: read, matched with its clips, and judged: are they of this data, and of this model?

    refused           no line is of a training clip, or no mined term is in the run's glossary: a file of other data
    warned about      less than half of the clips have a line; mined over another glossary; without a stamp;
                      mined by a model that is none of this run's; by an older one than the run has by now (stale)

With --hard_neg_strict what is warned about is refused as well. A term that its clip speaks is never used, whatever the
file says, so a foreign file can waste effort but not teach wrong things.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.clips import Clip
from data.drops import DropLog
from data.glossary import Glossary
from data.mined import ClipNegatives, match_negatives, terms_sha256
from data.negatives import load_hard_negatives, read_stamp
from data.records import find_file
from data.settings import DataSettings
from retrieval.model_files import CONFIG_FILE

logger = logging.getLogger(__name__)

LEAST_MATCHED = 0.5  # share of the training clips that a file of the same data has lines for


def load_negatives(
    settings: DataSettings, clips: Sequence[Clip], glossary: Glossary | None, run_dir: Path | None, drops: DropLog
) -> ClipNegatives | None:
    """None without --hard_neg_jsonl. ValueError for a file that is refused (see above); `run_dir`: whose models count
    as this run's."""
    if settings.hard_neg_jsonl is None:
        return None
    path = find_file(settings.hard_neg_jsonl, settings.data_root, "--hard_neg_jsonl")
    found, stamp = load_hard_negatives(path, drops), read_stamp(path)
    matched = match_negatives(clips, found, glossary)
    if matched.num_matched == 0:
        raise ValueError(
            f"hard_neg_jsonl: none of the {len(found)} keys of {path} is a training clip (the first is "
            f"{next(iter(found))!r}, the first clip {clips[0].clip_id!r}); mine over the training samples"
        )
    if glossary is not None and not set(matched.terms) & set(glossary.terms):
        raise ValueError(
            f"hard_neg_jsonl: none of the {len(matched.terms)} terms of {path} is in {glossary.path}; "
            "mine over the glossary of this run"
        )
    doubts = [*_foreign(stamp, matched, len(clips), glossary), *_stale(stamp, _own_models(run_dir))]
    if doubts and settings.hard_neg_strict:
        raise ValueError(f"hard_neg_jsonl: {path}: {'; '.join(doubts)} (refused because of --hard_neg_strict)")
    for doubt in doubts:
        logger.warning("mined negatives %s: %s", path, doubt)
    logger.info(
        "mined negatives: %d terms for %d of %d clips from %s; %d left out, as their clips speak them",
        len(matched.terms), matched.num_matched, len(clips), path, matched.num_refused,
    )  # fmt: skip
    return matched


def _foreign(stamp: dict[str, str], matched: ClipNegatives, num_clips: int, glossary: Glossary | None) -> list[str]:
    doubts = []
    if matched.num_matched < LEAST_MATCHED * num_clips:
        doubts.append(f"only {matched.num_matched} of {num_clips} training clips have a line")
    mined_over = stamp.get("glossary_sha256")
    if glossary is not None and mined_over is not None and mined_over != terms_sha256(glossary.terms):
        doubts.append("mined over another glossary than --glossary_path (glossary_sha256 differs)")
    return doubts


def _stale(stamp: dict[str, str], own_models: dict[str, int]) -> list[str]:
    miner = stamp.get("model_sha256")
    if miner is None:
        return ["no stamp tells which model mined it"]
    if miner not in own_models:
        return [f"mined by model {miner[:12]}, none of this run's: how hard they are for this one is not known"]
    newest = max(own_models.values())
    if own_models[miner] < newest:
        return [f"stale: mined at step {own_models[miner]}, and the run has a model of step {newest}; mine again"]
    return []


def _own_models(run_dir: Path | None) -> dict[str, int]:
    """Fingerprint -> step of the models that the run has written so far."""
    models: dict[str, int] = {}
    if run_dir is None:
        return models
    for path in (*run_dir.glob(f"model_*/{CONFIG_FILE}"), *run_dir.glob(f"checkpoints/step-*/{CONFIG_FILE}")):
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            logger.warning("%s: cannot be read, its model is not counted as this run's (%s)", path, error)
            continue
        if "fingerprint" in config:
            models[config["fingerprint"]] = int(config["info"].get("step", 0))
    return models
