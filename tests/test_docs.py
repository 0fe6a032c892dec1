"""The pages under docs/ are true of the code: flags exist, quoted errors are raised, both languages say the same."""

import dataclasses
import re
from pathlib import Path

import pytest

from bin.config import GROUPS, Config
from bin.cost import CostSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p.name for p in (ROOT / "docs").glob("*.md"))
ELSEWHERE = {  # flags of other programs
    "--gpu", "--max_cost", "--run_name", "--hf_secret", "--detach", "--json", "--help", "--nproc_per_node",
    "--shm-size", "--logdir", "--ranks", "--only",
}  # fmt: skip
FOREIGN = re.compile(r"[(（](PyTorch|gloo|NCCL|system|系统|Modal)[)）]")


def flags() -> set[str]:
    fields = [f for group in GROUPS for f in dataclasses.fields(getattr(Config(), group))]
    names = {f.name for f in fields} | {f"no-{f.name}" for f in fields if f.type is bool}
    names |= {"preset", "config"} | {f.name for f in dataclasses.fields(CostSettings)}
    return {f"--{name}" for name in names} | ELSEWHERE


def sources() -> str:
    """All string constants of the rooms, joined as the compiler joins adjacent ones."""
    text = "\n".join(p.read_text(encoding="utf-8") for room in ("bin", "data", "distributed", "losses", "model",
                     "retrieval", "lora") for p in (ROOT / room).glob("*.py"))  # fmt: skip
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.parametrize("page", [*PAGES, *(f"zh/{name}" for name in PAGES)])
def test_flags_of_the_pages_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - flags()
    assert not unknown, unknown


@pytest.mark.parametrize("page", ["troubleshooting.md", "zh/troubleshooting.md"])
def test_quoted_errors_are_in_the_sources(page: str) -> None:
    rows = [line for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    texts = [
        t for row in rows if not FOREIGN.search(row.split("|")[1]) for t in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert len(texts) > 20
    written = sources()
    missing = []
    for text in texts:
        # Numbers and names are filled in when the error is raised: what stands around them must be in the source.
        parts = [
            part for part in re.split(r"rank 3|data/audio\.py|\(Read-only file system\)|nan", text) if part.strip()
        ]
        missing += [text for part in parts if part.strip() not in written]
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_commands_and_rows(page: str) -> None:
    english, chinese = ((ROOT / "docs" / p).read_text(encoding="utf-8") for p in (page, f"zh/{page}"))
    assert re.findall(r"```.*?```", english, re.S) == re.findall(r"```.*?```", chinese, re.S)
    assert len(re.findall(r"^\|", english, re.M)) == len(re.findall(r"^\|", chinese, re.M))
    assert sorted(set(re.findall(r"--[a-z_]+", english))) == sorted(set(re.findall(r"--[a-z_]+", chinese)))
