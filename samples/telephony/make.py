"""Turn a folder of transcribed prompts into the telephony sample.

    python samples/telephony/make.py --prompts DIR --out DIR

DIR of the prompts holds four JSON Lines files and the audio they name:

    manifest.jsonl  {"id", "audio", "text", "duration_s"}                one prompt a line
    words.jsonl     {"id", "words": [{"word", "start", "end"}, ...]}     word times in seconds
    samples.jsonl   one chunk a line: segment_id (the prompt's id), term_chunk_text,
                    term_chunk_audio_ground_truth_terms, partial_terms, term and extended times
    terms.jsonl     {"term"}                                             the glossary

Written: audio/*.ogg (whole prompts), train.json, test.json, glossary.json, words.jsonl (training prompts only).

The split is by prompt and seeded. Prompts that say the same words stay on one side. A term of the test is either *seen*
(at least one training chunk is labelled with it) or *unseen* (no training prompt says it at all, labelled or not), so
that the test tells recall of known terms from recall of new ones. Every property is checked before anything is
written; the JSON is byte for byte the same from run to run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf

SAMPLE_RATE = 16_000
TEST_SHARE = (0.20, 0.25)  # of the term chunks, and of the no-term chunks
UNSEEN_SHARE = (0.15, 0.40)  # of the test's distinct terms
UNSEEN_CHUNK_SHARE = 0.10  # of all term chunks: what unseen terms may carry off before the rest is drawn
MAX_PROMPTS_OF_UNSEEN = 3  # a term said in more prompts than this is too costly to take out of training
TRIES = 400


@dataclass(frozen=True)
class Prompt:
    prompt_id: str
    audio: Path
    duration_s: float
    words: list[dict]
    chunks: list[dict]  # chunks around a term, then no-term chunks
    said: frozenset[str]  # glossary terms that occur in the words

    @property
    def text(self) -> str:
        return " ".join(word["word"] for word in self.words)

    @property
    def labels(self) -> set[str]:
        return {term for chunk in self.chunks for term in chunk["term_chunk_audio_ground_truth_terms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="folder with manifest.jsonl and the others")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; existing files are replaced")
    parser.add_argument("--seed", type=int, default=2026, help="seed of the split")
    parser.add_argument(
        "--compression", type=float, default=0.7, help="of Ogg Vorbis: 0 = largest and best, 1 = smallest"
    )
    args = parser.parse_args()
    if not 0.0 <= args.compression <= 1.0:
        raise ValueError(f"--compression {args.compression}: allowed are 0 to 1")

    terms = [row["term"] for row in read_jsonl(args.prompts / "terms.jsonl")]
    prompts = read_prompts(args.prompts, terms)
    test_texts = choose_test_texts(prompts, terms, args.seed)
    train = [prompt for prompt in prompts if prompt.text not in test_texts]
    test = [prompt for prompt in prompts if prompt.text in test_texts]
    summary = check_split(train, test)

    (args.out / "audio").mkdir(parents=True, exist_ok=True)
    num_bytes = sum(write_ogg(prompt, args.out / audio_name(prompt), args.compression) for prompt in prompts)
    write_json(args.out / "train.json", [record for prompt in train for record in records_of(prompt)])
    write_json(args.out / "test.json", [record for prompt in test for record in records_of(prompt)])
    write_json(args.out / "glossary.json", glossary_of(terms))
    write_words(args.out / "words.jsonl", train)
    print(summary)
    print(f"audio: {len(prompts)} files, {num_bytes / 1e6:.2f} MB, {sum(p.duration_s for p in prompts) / 60:.1f} min")


# ---------------------------------------------------------------- reading


def read_jsonl(path: Path) -> list[dict]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; --prompts must name a folder with manifest, words, samples and terms")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_prompts(folder: Path, terms: list[str]) -> list[Prompt]:
    """Prompts with word times, by id. Those without (they hold no speech) are left out."""
    words_of = {row["id"]: row["words"] for row in read_jsonl(folder / "words.jsonl")}
    chunks_of: dict[str, list[dict]] = {}
    for chunk in read_jsonl(folder / "samples.jsonl"):
        prompt_id = chunk["segment_id"].split("_no_term_")[0]
        chunks_of.setdefault(prompt_id, []).append(chunk)
    prompts = []
    for row in sorted(read_jsonl(folder / "manifest.jsonl"), key=lambda row: row["id"]):
        words = words_of.get(row["id"])
        if not words:
            print(f"left out, no word times: {row['id']} ({row['text']})")
            continue
        spoken = [word["word"] for word in words]
        said = frozenset(term for term in terms if says(spoken, term.split()))
        prompts.append(
            Prompt(row["id"], folder / row["audio"], row["duration_s"], words, chunks_of.pop(row["id"], []), said)
        )
    if chunks_of:
        raise ValueError(f"samples.jsonl names prompts that have no audio or words: {sorted(chunks_of)[:5]}")
    return prompts


def says(spoken: list[str], phrase: list[str]) -> bool:
    return any(spoken[i : i + len(phrase)] == phrase for i in range(len(spoken) - len(phrase) + 1))


# ---------------------------------------------------------------- the split


def choose_test_texts(prompts: list[Prompt], terms: list[str], seed: int) -> set[str]:
    """The texts whose prompts go to the test: of TRIES seeded draws, the valid one whose test has most terms."""
    best: set[str] = set()
    best_terms = 0
    for attempt in range(TRIES):
        texts = draw_test_texts(prompts, terms, random.Random(seed * TRIES + attempt))
        train = [prompt for prompt in prompts if prompt.text not in texts]
        test = [prompt for prompt in prompts if prompt.text in texts]
        try:
            check_split(train, test)
        except ValueError:
            continue
        num_terms = len(set().union(*(prompt.labels for prompt in test)))
        if num_terms > best_terms:
            best, best_terms = texts, num_terms
    if not best:
        raise ValueError(
            f"no draw of {TRIES} gives a valid split of these prompts with --seed {seed}; try another seed"
        )
    return best


def draw_test_texts(prompts: list[Prompt], terms: list[str], rng: random.Random) -> set[str]:
    by_text: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_text.setdefault(prompt.text, []).append(prompt)
    num_chunks = sum(len(term_chunks(prompt)) for prompt in prompts)
    num_no_term = sum(len(no_term_chunks(prompt)) for prompt in prompts)

    def chunks_in(texts: set[str]) -> int:
        return sum(len(term_chunks(prompt)) for text in texts for prompt in by_text[text])

    def no_term_in(texts: set[str]) -> int:
        return sum(len(no_term_chunks(prompt)) for text in texts for prompt in by_text[text])

    # Unseen terms first: each takes every prompt that says it along.
    texts: set[str] = set()
    for term in rng.sample(sorted(terms), len(terms)):
        saying = [prompt for prompt in prompts if term in prompt.said]
        grown = texts | {prompt.text for prompt in saying}
        if len(saying) <= MAX_PROMPTS_OF_UNSEEN and chunks_in(grown) <= UNSEEN_CHUNK_SHARE * num_chunks:
            texts = grown

    # Then texts of seen terms, as long as each term that the test asks for keeps a training label.
    for text in rng.sample(sorted(by_text), len(by_text)):
        grown = texts | {text}
        chunks, no_term = chunks_in({text}), no_term_in({text})
        if text in texts or not (chunks or no_term):
            continue
        if chunks and chunks_in(grown) > (TEST_SHARE[0] + 0.02) * num_chunks:
            continue
        if no_term and no_term_in(grown) > (TEST_SHARE[0] + 0.04) * num_no_term:
            continue
        kept = set().union(*(prompt.labels for prompt in prompts if prompt.text not in grown))
        if all(prompt.labels <= kept for prompt in by_text[text]):
            texts = grown
    return texts


def term_chunks(prompt: Prompt) -> list[dict]:
    return [chunk for chunk in prompt.chunks if chunk["term_chunk_audio_ground_truth_terms"]]


def no_term_chunks(prompt: Prompt) -> list[dict]:
    return [chunk for chunk in prompt.chunks if not chunk["term_chunk_audio_ground_truth_terms"]]


def check_split(train: list[Prompt], test: list[Prompt]) -> str:
    """Raise ValueError where the split breaks a promise of the module's docstring; else a summary to print."""
    shared = {prompt.text for prompt in train} & {prompt.text for prompt in test}
    require(not shared, f"the same text is in train and test: {sorted(shared)[:3]}")
    require(not {p.prompt_id for p in train} & {p.prompt_id for p in test}, "a prompt is in train and test")

    train_labels = set().union(*(prompt.labels for prompt in train))
    train_said = set().union(*(prompt.said for prompt in train))
    test_labels = set().union(*(prompt.labels for prompt in test))
    unseen = test_labels - train_said
    unlabelled = (test_labels & train_said) - train_labels
    require(not unlabelled, f"test terms that training says but never labels: {sorted(unlabelled)}")
    share = len(unseen) / max(1, len(test_labels))
    require(UNSEEN_SHARE[0] <= share <= UNSEEN_SHARE[1], f"{share:.1%} of the test's terms are unseen")

    counts = {}
    for name, chunks_of in (("term", term_chunks), ("no-term", no_term_chunks)):
        num_train, num_test = (sum(len(chunks_of(prompt)) for prompt in side) for side in (train, test))
        counts[name] = (num_train, num_test)
        share = num_test / max(1, num_train + num_test)
        require(TEST_SHARE[0] <= share <= TEST_SHARE[1], f"{share:.1%} of the {name} chunks are in the test")
    return (
        f"prompts: train {len(train)}, test {len(test)}\n"
        f"term chunks: train {counts['term'][0]}, test {counts['term'][1]}; "
        f"no-term chunks: train {counts['no-term'][0]}, test {counts['no-term'][1]}\n"
        f"distinct terms: train {len(train_labels)}, test {len(test_labels)}, "
        f"of these unseen in training {len(unseen)}: {', '.join(sorted(unseen))}"
    )


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"split: {message}")


# ---------------------------------------------------------------- writing


def audio_name(prompt: Prompt) -> str:
    return f"audio/{prompt.prompt_id.replace('/', '_')}.ogg"


def records_of(prompt: Prompt) -> list[dict]:
    """The prompt's chunks as records; segment_id is made unique, the span within the file is explicit."""
    records = []
    for number, chunk in enumerate(term_chunks(prompt)):
        records.append(record_of(prompt, chunk, f"{prompt.prompt_id}_term_{number}"))
    for number, chunk in enumerate(no_term_chunks(prompt)):
        records.append(record_of(prompt, chunk, f"{prompt.prompt_id}_no_term_{number}"))
    return records


def record_of(prompt: Prompt, chunk: dict, segment_id: str) -> dict:
    terms = chunk["term_chunk_audio_ground_truth_terms"]
    start_s, end_s = chunk["extended_start_time"], chunk["extended_end_time"]
    if not 0.0 <= start_s < end_s <= prompt.duration_s + 1e-3:
        raise ValueError(f"{segment_id}: window {start_s} to {end_s} s lies outside the prompt ({prompt.duration_s} s)")
    return {
        "segment_id": segment_id,
        "term_chunk_audio": audio_name(prompt),
        "term_chunk_audio_start": start_s,
        "term_chunk_audio_end": end_s,
        "term_chunk_text": chunk["term_chunk_text"],
        "term_chunk_audio_ground_truth_terms": terms,
        "partial_terms": chunk["partial_terms"],
        "is_no_term_chunk": not terms,
        "term_start_time": chunk["term_start_time"],
        "term_end_time": chunk["term_end_time"],
        "extended_start_time": start_s,
        "extended_end_time": end_s,
        "term_duration": chunk["term_duration"],
    }


def glossary_of(terms: list[str]) -> dict[str, dict]:
    return {
        term: {"term": term, "short_description": "", "confused": False, "target_translations": {}}
        for term in sorted(terms)
    }


def write_ogg(prompt: Prompt, path: Path, compression: float) -> int:
    """Encode the whole prompt; the bytes written. Raises ValueError when the copy is not as long as the source."""
    pcm_S, rate = sf.read(prompt.audio, dtype="float32")
    if rate != SAMPLE_RATE or pcm_S.ndim != 1:
        raise ValueError(f"{prompt.audio}: {rate} Hz, shape {pcm_S.shape}; prompts are {SAMPLE_RATE} Hz mono")
    with sf.SoundFile(path, "w", rate, 1, "VORBIS", format="OGG", compression_level=compression) as file:
        file.write(np.clip(pcm_S, -1.0, 1.0))
    decoded_S, _ = sf.read(path, dtype="float32")
    if len(decoded_S) != len(pcm_S):
        raise ValueError(f"{path}: {len(decoded_S)} samples after encoding, {len(pcm_S)} before")
    return path.stat().st_size


def write_json(path: Path, value: list | dict) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_words(path: Path, prompts: list[Prompt]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            row = {
                "id": prompt.prompt_id,
                "audio": audio_name(prompt),
                "duration_s": prompt.duration_s,
                "words": prompt.words,
            }
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
