"""A measurement in the formats of other evaluation tools: TREC run and qrels, and a BEIR folder.

    run.trec      clip Q0 term rank score tag     the best terms of each clip, best first
    qrels.trec    clip 0 term 1                   the right terms of each clip

Ids of clips and terms are percent-encoded, as the format separates by blanks. trec_eval ranks by score alone and breaks
ties its own way, so a score equal to the one before it is written one fp32 step lower: every tool then sees our order.
A clip's ignored terms are in neither file, and right terms beyond the depth of the run count as not found there.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np

from retrieval.measured import Measured

RUN_FILE, QRELS_FILE = "run.trec", "qrels.trec"


def write_trec(folder: Path, measured: Measured, num_terms: int | None = None, tag: str = "earmark") -> None:
    """run.trec (as deep as terms were kept) and qrels.trec of one glossary size, by default the glossary itself."""
    ranks = measured.ranks if num_terms is None else measured.ranks_by_size[num_terms]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RUN_FILE).open("w", encoding="ascii") as file:
        for row, clip in enumerate(ranks.clip_C):
            clip_id, last = quote(measured.clips[clip].clip_id, safe=""), np.float32(np.inf)
            best = zip(ranks.top_place_CT[row], ranks.top_score_CT[row], strict=True)
            for number, (place, score) in enumerate((p, s) for p, s in best if p >= 0):
                last = min(score, np.nextafter(last, np.float32(-np.inf)))
                term_id = quote(measured.terms[place], safe="")
                file.write(f"{clip_id} Q0 {term_id} {number + 1} {float(last)!r} {tag}\n")
    with (folder / QRELS_FILE).open("w", encoding="ascii") as file:
        file.writelines(f"{clip_id} 0 {term_id} 1\n" for clip_id, term_id in _right(measured))


def write_beir(folder: Path, measured: Measured, split: str = "test") -> None:
    """corpus.jsonl (all terms ranked), queries.jsonl (clips: what is said, where the audio lies), qrels/<split>.tsv.

    BEIR's queries are texts; ours are audio, so the text is there to read, and `metadata` names the file and span.
    """
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for term in measured.terms:
            file.write(_line({"_id": quote(term, safe=""), "title": "", "text": term}))
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
        for clip in (measured.clips[index] for index in measured.ranks.clip_C):
            where = {"audio": clip.audio_path, "start_s": clip.start_s, "end_s": clip.end_s}
            file.write(_line({"_id": quote(clip.clip_id, safe=""), "text": clip.text, "metadata": where}))
    with (folder / "qrels" / f"{split}.tsv").open("w", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"{clip_id}\t{term_id}\t1\n" for clip_id, term_id in _right(measured))


def _right(measured: Measured) -> Iterator[tuple[str, str]]:
    ranks = measured.ranks
    for row, place in zip(ranks.row_P, ranks.place_P, strict=True):
        clip = measured.clips[ranks.clip_C[row]]
        yield quote(clip.clip_id, safe=""), quote(measured.terms[place], safe="")


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
