"""Make an index of embedded terms once, and change it without starting again.

    python bin/index.py make --model runs/mine --glossary glossary.json --out glossary.index
    python bin/index.py append --index glossary.index --model runs/mine --glossary more.json
    python bin/index.py remove --index glossary.index --terms "pound key" voicemail
    python bin/index.py approximate --index glossary.index --kind hnsw
    python bin/index.py show --index glossary.index

Search is exact, which takes milliseconds up to a million terms. Beyond that, `approximate` adds a faiss index and says
how much of the exact result it finds; changing the terms afterwards takes it off again.
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from bin.ending import run_program
from bin.opening import ModelFlags, log_to_standard_error
from data.drops import DropLog
from data.glossary import load_glossary
from data.terms import normalise_term
from distributed.atomic import write_folder_atomically
from distributed.processes import choose_device
from retrieval.approximate import Kind
from retrieval.index import TermIndex, read_index_file
from retrieval.retriever import Retriever, find_model

logger = logging.getLogger("earmark")


@dataclass
class Make:
    """Embed a glossary."""

    model: tyro.conf.OmitArgPrefixes[ModelFlags]
    glossary: str
    """Glossary file (.json, .jsonl, .csv, .tsv, .txt)."""
    out: str
    """Folder of the index; one that is an index already is replaced."""

    def run(self) -> None:
        out = Path(self.out)
        if out.exists():
            read_index_file(out)  # never replace a folder that is something else
        retriever, drops, started = _load(self.model), DropLog(), time.perf_counter()
        index = retriever.index(Path(self.glossary), drops)
        _save(index, out, f"{self.glossary}: {drops.summary()}" if drops.notes else self.glossary)
        logger.info("%d terms embedded in %.1f s", len(index), time.perf_counter() - started)


@dataclass
class Append:
    """Add the terms of a glossary that an index does not hold yet; only these are embedded."""

    model: tyro.conf.OmitArgPrefixes[ModelFlags]
    index: str
    """Folder of the index."""
    glossary: str
    """Glossary file."""

    def run(self) -> None:
        index = TermIndex.load(self.index)
        glossary = load_glossary(self.glossary)
        longer = _load(self.model).extend(index, glossary)
        _save(longer, Path(self.index), self.glossary)
        logger.info("%d of %d terms were new", len(longer) - len(index), len(glossary.entries))


@dataclass
class Remove:
    """Take terms out of an index."""

    index: str
    """Folder of the index."""
    terms: tuple[str, ...]
    """The terms, in any spelling of the same normal form."""

    def run(self) -> None:
        index = TermIndex.load(self.index)
        _save(index.remove([normalise_term(term) for term in self.terms]), Path(self.index), "")


@dataclass
class MakeApproximate:
    """Add approximate search (needs the extra faiss), and measure how much of the exact result it finds."""

    index: str
    """Folder of the index."""
    kind: Kind = "hnsw"
    """hnsw searches faster, ivf is built faster."""

    def run(self) -> None:
        index = TermIndex.load(self.index).approximated(self.kind)
        _save(index, Path(self.index), read_index_file(Path(self.index))["info"].get("glossary", ""))
        assert index.approximate is not None
        print(", ".join(f"{name} {value:.3f}" for name, value in index.approximate.facts["recall"].items()))


@dataclass
class Show:
    """Tell what an index is."""

    index: str
    """Folder of the index."""

    def run(self) -> None:
        index = TermIndex.load(self.index)
        print(json.dumps(read_index_file(Path(self.index)), indent=2, ensure_ascii=False))
        print("first terms:", ", ".join(term.surface for term in index.terms[:10]))


Command = (
    Annotated[Make, tyro.conf.subcommand("make")]
    | Annotated[Append, tyro.conf.subcommand("append")]
    | Annotated[Remove, tyro.conf.subcommand("remove")]
    | Annotated[MakeApproximate, tyro.conf.subcommand("approximate")]
    | Annotated[Show, tyro.conf.subcommand("show")]
)


def _load(model: ModelFlags) -> Retriever:
    return Retriever.load(find_model(model.model), choose_device(model.device, 0), model.model_name)


def _save(index: TermIndex, folder: Path, glossary: str) -> None:
    write_folder_atomically(folder, lambda temporary: index.save(temporary, {"glossary": glossary}))
    print(f"{folder}: {len(index)} terms, model {index.fingerprint[:12]}")


def main(argv: Sequence[str] | None = None) -> int:
    command: Make | Append | Remove | MakeApproximate | Show = tyro.cli(
        Command,  # type: ignore[arg-type]
        args=argv,
        use_underscores=True,
        prog="bin/index.py",
        description=__doc__,
    )
    log_to_standard_error()
    return run_program("bin/index.py", command.run)


if __name__ == "__main__":
    sys.exit(main())
