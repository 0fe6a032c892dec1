"""The calibrated threshold as part of a trained model: written into its retriever_config.json, read back from there.

    "threshold": {"value": 0.61, "k": 10, "target": "precision=0.9", "num_terms": 96, "samples": ".../dev.json",
                  "num_clips": 111, "precision": 0.903, "recall": 0.61, "false_alarm": 0.08}

A search that asks for the calibrated threshold reports, of the k best terms of a clip, those with score >= value.
"""

import json
from pathlib import Path
from typing import Any

from distributed.atomic import MANIFEST, json_bytes, replace_files, save_single_file, write_file_atomically
from retrieval.calibration import OperatingPoint, Target
from retrieval.model_files import CONFIG_FILE, read_config, single_file_tensors


def describe_threshold(found: OperatingPoint, target: Target, num_terms: int, num_clips: int, samples: str) -> dict:
    """What is stored: the value, what it was chosen for, on what, and what it did there."""
    return {
        "value": found.threshold,
        "k": found.k,
        "target": str(target),
        "num_terms": num_terms,
        "num_clips": num_clips,
        "samples": samples,
        "precision": found.precision,
        "recall": found.recall,
        "false_alarm": found.false_alarm,
    }


def store_threshold(folder: Path, threshold: dict[str, Any]) -> None:
    """Add the threshold to a model folder, or replace it, and renew the one-file copy beside it. Atomic.

    Raises ValueError when the folder holds no model.
    """
    content = json_bytes(read_config(folder) | {"threshold": threshold})
    if (folder / MANIFEST).exists():
        replace_files(folder, {CONFIG_FILE: content})
    else:
        write_file_atomically(folder / CONFIG_FILE, content)
    one_file = folder.with_name(f"{folder.name}.pt")
    if one_file.is_file():
        save_single_file(one_file, *single_file_tensors(folder))


def read_threshold(folder: Path) -> dict[str, Any] | None:
    """The stored threshold; None when there is none. ValueError when it is not what `store_threshold` writes."""
    threshold = read_config(folder).get("threshold")
    if threshold is None:
        return None
    is_right = (
        isinstance(threshold, dict) and isinstance(threshold.get("value"), float) and _is_count(threshold.get("k"))
    )
    if not is_right:
        raise ValueError(f"{folder / CONFIG_FILE}: its threshold {json.dumps(threshold):.80} has no value and k")
    return threshold


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
