"""The indexing benchmark at a small size, and what it stands on."""

import json
from pathlib import Path

import pytest
import torch

from bench.index import FourByteTokens, encode_padded, made_up_terms, main, make_retriever


def test_it_measures_and_scales_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--shapes", "tiny", "--terms", "60", "--peer_terms", "30", "--threads", "1"]
    assert main([*flags, "--out", str(tmp_path / "i.json")]) == 0
    figures = json.loads((tmp_path / "i.json").read_text())
    assert figures["estimate_s"] == pytest.approx(figures["seconds"] * 1_000_000 / 60)
    assert figures["padded_x"] > 0
    shown = capsys.readouterr().out
    assert "tokens of four bytes (no tokenizer given)" in shown
    assert "scaled up, not measured" in shown


def test_terms_can_come_from_a_glossary(tmp_path: Path) -> None:
    (tmp_path / "g.txt").write_text("\n".join(f"term number {n}" for n in range(50)))
    flags = ["--device", "cpu", "--shapes", "tiny", "--terms", "10", "--peer_terms", "5", "--threads", "1"]
    assert main([*flags, "--glossary", str(tmp_path / "g.txt"), "--out", str(tmp_path / "i.json")]) == 0
    assert json.loads((tmp_path / "i.json").read_text())["terms"] == 10


def test_made_up_terms_are_distinct_and_the_same_each_time() -> None:
    terms = made_up_terms(200)
    assert len(set(terms)) == 200
    assert terms == made_up_terms(200)
    assert FourByteTokens(100)(["abcdefgh", "abcdefghi"])[0] == FourByteTokens(100)(["abcdefghi"])[0][:2]
    assert [len(ids) for ids in FourByteTokens(100)(["a", "abcd", "abcde"])] == [1, 1, 2]


def test_the_peer_encodes_all_strings_filled_up() -> None:
    retriever = make_retriever("cpu", "tiny", None)
    seen: list[list[int]] = []
    encode_text = retriever.model.encode_text
    retriever.model.encode_text = lambda pack: seen.append(pack.lengths) or encode_text(pack)  # type: ignore
    assert torch.isfinite(encode_padded(retriever, ["a" * n for n in range(1, 71)]))
    assert seen == [[16] * 64, [18] * 6]
