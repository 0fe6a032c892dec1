"""How long embedding a glossary takes, measured on a part of it and scaled up to a million terms.

    python bench/index.py --device cuda --terms 20000 --out index.json
    python bench/index.py --device cpu --shapes tiny --terms 500 --peer_terms 500

The text tower has the shape of Qwen2-Audio's language model and random weights, in bf16 on a GPU. Terms are those of
--glossary, or made up of syllables, one to four words each. Their tokens come from --tokenizer (a checkpoint's folder);
without one, four bytes count as a token, about what Qwen2's tokenizer makes of English names, and the report says so.

  ours   Retriever.encode_terms: tokenised, packed without padding, longest first, embeddings on the device
  peer   the same tower on the same terms in padded batches of 64 in the order they came, as an encoder usually is
         called: what packing and sorting are worth. It runs on --peer_terms of them.

The estimate is the time of ours, less nothing, times 1,000,000 / terms; it holds if the other terms are as long.

Shapes: P packed tokens.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from bench.ours import Shapes
from data.glossary import load_glossary
from model.build import build_model
from model.packing import TextPack
from model.text_tower import TextConfig
from model.tokenizer import CheckpointTokenizer, Tokenizer
from retrieval.model_files import OpenedModel
from retrieval.retriever import Retriever

SCALED_TO = 1_000_000
PROJ_DIM = 512
BYTES_A_TOKEN = 4
PEER_BATCH = 64
SYLLABLES = ("ka", "ro", "mi", "ten", "sol", "ver", "ana", "bri", "du", "fex", "gor", "hal", "ist", "jun", "kel", "zem")


class FourByteTokens:
    """A stand-in for a tokenizer: every four bytes of UTF-8 are a token, whose id is their checksum."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._tokens(text.encode()) for text in texts]

    def _tokens(self, raw: bytes) -> list[int]:
        return [zlib.crc32(raw[i : i + BYTES_A_TOKEN]) % self.vocab_size for i in range(0, len(raw), BYTES_A_TOKEN)]


def made_up_terms(count: int) -> list[str]:
    """Distinct terms of one to four words of one to four syllables."""
    rng, terms = np.random.default_rng(0), dict[str, None]()
    while len(terms) < count:
        words = ["".join(rng.choice(SYLLABLES, rng.integers(1, 5))) for _ in range(rng.integers(1, 5))]
        terms[" ".join(words)] = None
    return list(terms)


def make_retriever(device: str, shapes: str, tokenizer_folder: str | None) -> Retriever:
    """A retriever over random weights. Its audio tower, which has no part in this, is tiny."""
    text = Shapes.of(tiny=shapes == "tiny").text
    with tempfile.TemporaryDirectory() as folder:
        settings = Shapes(Shapes.of(tiny=True).audio, text).write(Path(folder))
        built = build_model(replace(settings, proj_dim=PROJ_DIM), device)
    tokenizer: Tokenizer = FourByteTokens(TextConfig.from_hf(text).vocab_size)
    if tokenizer_folder is not None:
        tokenizer = CheckpointTokenizer(tokenizer_folder)
    built.tokenizer = tokenizer
    return Retriever(OpenedModel(built, 0.07, {}, "random weights"))


@torch.no_grad()
def encode_padded(retriever: Retriever, terms: Sequence[str]) -> torch.Tensor:
    """The peer: batches of 64 in the order of the terms, each filled up to its longest with tokens to encode.

    Token counts are what costs; the embeddings of the filled-up strings are of no use and are not returned.
    """
    total = torch.zeros((), device=retriever.device)
    for start in range(0, len(terms), PEER_BATCH):
        ids = retriever.tokenizer(list(terms[start : start + PEER_BATCH]))
        longest = max(map(len, ids))
        flat_P = torch.tensor([token for one in ids for token in (*one, *[0] * (longest - len(one)))])
        total += retriever.model.encode_text(TextPack(flat_P, [longest] * len(ids))).sum()
    return total


def timed(work: Callable[[], torch.Tensor]) -> float:
    """Seconds until the result is there."""
    started = time.perf_counter()
    assert torch.isfinite(work()).all()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", default="full", choices=["full", "tiny"])
    parser.add_argument("--terms", type=int, default=20_000)
    parser.add_argument("--peer_terms", type=int, default=2_000)
    parser.add_argument("--glossary", help="glossary file to take the terms from, at even distances")
    parser.add_argument("--tokenizer", help="folder of a checkpoint with tokenizer.json")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    terms = made_up_terms(args.terms)
    if args.glossary is not None:
        known = load_glossary(args.glossary).terms
        terms = known[:: max(1, len(known) // args.terms)][: args.terms]

    retriever = make_retriever(args.device, args.shapes, args.tokenizer)
    num_tokens = sum(map(len, retriever.tokenizer(terms)))
    peer_terms = terms[: args.peer_terms]
    retriever.encode_terms(peer_terms)  # warm-up: kernels are chosen, memory is taken
    seconds = timed(lambda: retriever.encode_terms(terms))
    ours_part, peer_part = [], []
    for _ in range(3):
        ours_part.append(timed(lambda: retriever.encode_terms(peer_terms)))
        peer_part.append(timed(lambda: encode_padded(retriever, peer_terms)))
    ratio = float(np.median(peer_part) / np.median(ours_part))
    estimate_s = seconds * SCALED_TO / len(terms)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    counted = "tokens of the checkpoint's tokenizer" if args.tokenizer else "tokens of four bytes (no tokenizer given)"
    parameters = sum(p.numel() for p in retriever.model.language_model.parameters()) / 1e9
    print(f"{name}, torch {torch.__version__}: text tower of {parameters:.2f} B parameters, shapes {args.shapes}")
    rate, length = len(terms) / seconds, num_tokens / len(terms)
    print(f"{len(terms)} terms, {length:.2f} {counted} each: {seconds:.2f} s, {rate:.0f} a second")
    print(f"estimate for {SCALED_TO} such terms: {estimate_s / 60:.1f} minutes (scaled up, not measured)")
    print(f"padded batches of {PEER_BATCH}, {len(peer_terms)} terms: {ratio:.2f} x our time (medians of 3, in turn)")
    if args.out is not None:
        figures = {"device": name, "torch": torch.__version__, "shapes": args.shapes, "terms": len(terms)}
        measured = {"seconds": seconds, "tokens": num_tokens, "tokenizer": args.tokenizer, "estimate_s": estimate_s}
        args.out.write_text(json.dumps(figures | measured | {"padded_x": ratio}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
