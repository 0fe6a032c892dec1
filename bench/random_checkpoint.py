"""Write a Qwen2-Audio checkpoint of random weights in the layout of the published ones.

    python bench/random_checkpoint.py OUT [--shapes full|tiny] [--layout v4|v5] [--tokenizer DIR]

Speed, memory and the agreement of two implementations do not depend on what the weights are, so true-size measurements
need no download. `full` has the shapes of Qwen2-Audio-7B (8.4 B parameters, 16.8 GB); `tiny` runs anywhere.

| parameter           | value                                      |
|---------------------|--------------------------------------------|
| matrix, convolution | normal, std 0.02                           |
| bias                | normal, std 0.02: zeros would hide a loss  |
| embed_positions     | Whisper's sinusoids                        |
| norm weight         | 1                                          |
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import json
import math
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from model.audio_tower import AudioConfig
from model.dual import DualEncoder
from model.init import sinusoids
from model.text_tower import TextConfig

Layout = Literal["v4", "v5"]
Shape = tuple[int, ...]

STD = 0.02
BYTES_PER_VALUE = 2  # bf16
MAX_SHARD_BYTES = 5_000_000_000
NUM_WRITERS = 4
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
END_OF_TEXT = "<|endoftext|>"

# What Qwen/Qwen2-Audio-7B-Instruct publishes: the text tower's width, layers and heads are left to defaults.
PUBLISHED_AUDIO: dict[str, Any] = {
    "model_type": "qwen2_audio_encoder",
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layerdrop": 0.0,
    "d_model": 1280,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_function": "gelu",
    "activation_dropout": 0.0,
    "scale_embedding": False,
    "max_source_positions": 1500,
}
PUBLISHED_TEXT: dict[str, Any] = {
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "intermediate_size": 11008,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,
    "sliding_window": 32768,
    "use_mrope": False,
    "vocab_size": 156032,
}
AUDIO_TOKEN_ID = 151646
# Grouped queries, which the published model does not have, but the tower must bear.
TINY_AUDIO = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PREPROCESSOR: dict[str, Any] = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "processor_class": "Qwen2AudioProcessor",
    "feature_size": 128,
    "sampling_rate": 16000,
    "n_fft": 400,
    "hop_length": 160,
    "chunk_length": 30,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
}

# Our parts -> the checkpoint's names, of transformers 4 (which is what is published) and 5.
NAMES: dict[Layout, dict[str, str]] = {
    "v4": {
        "audio_tower": "audio_tower",
        "multi_modal_projector": "multi_modal_projector",
        "language_model": "language_model.model",
        "lm_head": "language_model.lm_head",
    },
    "v5": {
        "audio_tower": "model.audio_tower",
        "multi_modal_projector": "model.multi_modal_projector",
        "language_model": "model.language_model",
        "lm_head": "lm_head",
    },
}


def make_config(shapes: Literal["full", "tiny"], layout: Layout, num_ids: int) -> dict[str, Any]:
    """config.json as published, or with tiny towers whose vocabulary just holds the tokenizer's `num_ids`.

    Raises ValueError when the tokenizer has more ids than the published vocabulary.
    """
    audio, text, audio_token_id = dict(PUBLISHED_AUDIO), dict(PUBLISHED_TEXT), AUDIO_TOKEN_ID
    if shapes == "tiny":
        vocab_size = 64 * math.ceil((num_ids + 1) / 64)  # one id at least that no text has: the audio token's
        audio |= TINY_AUDIO
        text |= TINY_TEXT | {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None}
        audio_token_id = AUDIO_TOKEN_ID if vocab_size > AUDIO_TOKEN_ID else vocab_size - 1
    if num_ids > text["vocab_size"]:
        raise ValueError(f"tokenizer: it has {num_ids} ids, the model {text['vocab_size']} embeddings; give Qwen2's")
    dtype_field, version = "torch_dtype", "4.38.1"
    if layout == "v5":
        dtype_field, version = "dtype", "5.17.0"
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": float(text.pop("rope_theta"))}
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_config": audio,
        "audio_token_index": audio_token_id,
        "ignore_index": -100,
        "text_config": text | {dtype_field: "bfloat16"},
        dtype_field: "bfloat16",
        "transformers_version": version,
        "vocab_size": text["vocab_size"],
    }


def checkpoint_tensors(config: Mapping[str, Any], layout: Layout) -> dict[str, Shape]:
    """Key and shape of every tensor of the checkpoint, the language model's head included."""
    text_config = TextConfig.from_hf(config)
    with torch.device("meta"):
        model = DualEncoder(AudioConfig.from_hf(config), text_config, audio_readout="lm")
    tensors: dict[str, Shape] = {}
    for path, parameter in model.named_parameters():
        part, _, rest = path.partition(".")
        if part in NAMES[layout]:  # our own heads belong to no checkpoint
            tensors[f"{NAMES[layout][part]}.{rest}"] = tuple(parameter.shape)
    tensors[f"{NAMES[layout]['lm_head']}.weight"] = (text_config.vocab_size, text_config.hidden_size)
    return tensors


def total_bytes(tensors: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in tensors.values()) * BYTES_PER_VALUE


def split_into_shards(tensors: Mapping[str, Shape], max_bytes: int) -> list[list[str]]:
    """Keys of each file, in order, filled up to `max_bytes` (a single larger tensor gets a file of its own)."""
    shards: list[list[str]] = []
    room = 0
    for key, shape in tensors.items():
        size = math.prod(shape) * BYTES_PER_VALUE
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(key)
        room -= size
    return shards


def random_value(key: str, shape: Shape, seed: int, device: torch.device) -> Tensor:
    """bf16 on `device`, as the table above says; the same for the same seed and kind of device."""
    owner, _, leaf = key.rpartition(".")
    owner = owner.rpartition(".")[2]
    if owner == "embed_positions":
        return sinusoids(*shape).to(device, torch.bfloat16)
    if "norm" in owner and leaf == "weight":
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, STD, generator=generator)


def write_shard(path: Path, tensors: Mapping[str, Shape], seeds: Mapping[str, int], device: torch.device) -> None:
    """One safetensors file, written tensor after tensor, so that memory holds one at a time.

    The format (https://github.com/huggingface/safetensors): length of the header (8 bytes, little endian), a JSON
    header padded with spaces to a multiple of 8, then the tensors' bytes without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in tensors.items():
        start, end = end, end + math.prod(shape) * BYTES_PER_VALUE
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for key, shape in tensors.items():
            value = random_value(key, shape, seeds[key], device).cpu()
            file.write(value.flatten().view(torch.uint8).numpy().data)


def write_weights(
    out: Path, tensors: Mapping[str, Shape], seed: int, device: torch.device, max_shard_bytes: int
) -> None:
    """All shards and their index."""
    shards = split_into_shards(tensors, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    # A seed a tensor: the order in which the writers come to draw does not matter.
    seeds = {key: seed * 1_000_003 + place for place, key in enumerate(sorted(tensors))}
    with ThreadPoolExecutor(NUM_WRITERS if device.type == "cuda" else 1) as pool:
        jobs = [
            pool.submit(write_shard, out / name, {key: tensors[key] for key in keys}, seeds, device)
            for name, keys in zip(names, shards, strict=True)
        ]
        for job in jobs:
            job.result()
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_bytes(_json_bytes(index))


def read_tokenizer(source: Path | None) -> dict[str, bytes]:
    """The files of a tokenizer by name: of the folder `source`, or of one made here, of bytes."""
    if source is None:
        return {name: _json_bytes(value) for name, value in _byte_tokenizer().items()}
    if not (source / "tokenizer.json").is_file():
        raise ValueError(f"tokenizer: no tokenizer.json in {source}; give a folder with a fast tokenizer's files")
    return {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}


def count_ids(tokenizer_json: bytes) -> int:
    """One more than the highest id."""
    saved = json.loads(tokenizer_json)
    return max([*saved["model"]["vocab"].values(), *(token["id"] for token in saved["added_tokens"])]) + 1


def _byte_tokenizer() -> dict[str, Any]:
    """A byte-level BPE without merges: 256 bytes and an end-of-text mark."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # GPT-2's alphabet: a byte that prints stands for itself, the others take the code points from 256 on.
    alphabet = [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    marks = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": 256, "content": END_OF_TEXT, **flags}],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": {character: i for i, character in enumerate(alphabet)}, "merges": []},
        },
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **marks},
        "special_tokens_map.json": marks,
    }


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_checkpoint(
    out: Path,
    shapes: Literal["full", "tiny"] = "full",
    layout: Layout = "v4",
    tokenizer: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Make the folder `out` and everything in it; returns the bytes of the weights.

    Raises ValueError when `out` holds something already, the disk is too small, or the tokenizer does not fit.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT: {out} exists and is not an empty folder; give a new one")
    tokenizer_files = read_tokenizer(tokenizer)
    config = make_config(shapes, layout, count_ids(tokenizer_files["tokenizer.json"]))
    tensors = checkpoint_tensors(config, layout)
    out.mkdir(parents=True, exist_ok=True)
    needed, free = total_bytes(tensors), shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(f"OUT: {out} has {free / 1e9:.2f} GB free, the weights take {needed / 1e9:.2f}")
    files = tokenizer_files | {
        "config.json": _json_bytes(config),
        "preprocessor_config.json": _json_bytes(PREPROCESSOR),
    }
    for name, content in files.items():
        (out / name).write_bytes(content)
    write_weights(out, tensors, seed, torch.device(device), max_shard_bytes)
    return needed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a Qwen2-Audio checkpoint of random weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--shapes", choices=("full", "tiny"), default="full", help="the published 7B's, or tiny ones")
    parser.add_argument("--layout", choices=("v4", "v5"), default="v4", help="key names; v4 is what is published")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder whose tokenizer to copy; by default one of bytes is made"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="where the numbers are drawn; auto: CUDA if there is any")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        size = write_checkpoint(args.out, args.shapes, args.layout, args.tokenizer, args.seed, args.device)
    except ValueError as error:
        parser.error(str(error))
    seconds = time.perf_counter() - started
    print(f"{args.out}: {size / 1e9:.2f} GB of weights in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
