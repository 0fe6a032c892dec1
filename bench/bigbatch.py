"""A contrastive batch of 16,384 clips on one GPU under a 40 GiB cap: the two-pass step beside one pass and beside the
naive two-pass step, which keeps nothing of the first pass.

    python bench/bigbatch.py [--tiny] [--json FILE]

Before anything is timed, gradients of the two-pass step are held against those of the same chunks in one pass, dropout
on. One pass is timed at the largest batch that fits; the chunk of the two-pass step is the largest that leaves room for
the loss over all 16,384 clips. Clips a second count the batch's clips once.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from bench.drawn import Drawn, as_batch, draw, on_device
from bench.findings import Findings, run_alone
from bench.limits import Limits, bench_device, synchronize
from bench.ours import Shapes, Training, batches, build, cap_memory, count_tokens, num_captures, peak_gib
from bin.feed import FedBatch
from bin.fit import GRAPHS_SPREAD, costs, room_bytes
from bin.step import Encoded
from model.memory import clips_in

CAP_GIB = 40.0
NUM_CLIPS = 16_384
NUM_DRAWN = 2048  # different clips among them
ONE_PASS_CLIPS = (256, 240, 224, 208, 192, 160, 128, 64)  # 256: more than the layers' bytes leave room for
LEAST_COSINE, LEAST_RATIO = 0.9999, 0.62


def many_clips(num_clips: int, shapes: Shapes, device: torch.device) -> FedBatch:
    """A batch in which the same waveforms return; texts and terms are all different."""
    drawn = draw(min(num_clips, NUM_DRAWN), torch.Generator().manual_seed(0))
    times = num_clips // drawn.num_clips
    many = Drawn(
        drawn.waves * times,
        drawn.text_lengths_B.repeat(times),
        drawn.num_terms_B.repeat(times),
        drawn.term_lengths_N.repeat(times),
    )
    return on_device(as_batch(many, 0, shapes.vocabulary), device)


def check_gradient(training: Training, fed: FedBatch, clips_per_pass: int) -> float:
    """Cosine between the gradients in two passes and in one over the same chunks. RuntimeError where it is too low."""
    found = []
    for num_kept in (fed.batch.num_clips, 1):
        training.zero()
        torch.manual_seed(0)
        training.backward(fed, clips_per_pass, num_kept)
        found.append(training.gradient())
    cosine = float(F.cosine_similarity(found[0].double(), found[1].double(), dim=0))
    if not cosine >= LEAST_COSINE:
        raise RuntimeError(f"two-pass gradient: cosine {cosine:.6f} to one pass, at least {LEAST_COSINE}")
    return cosine


def time_step(training: Training, fed: FedBatch, clips_per_pass: int = 0, num_kept: int = 1, count: int = 1) -> float:
    """Median seconds of a step."""
    times = []
    for _ in range(count):
        synchronize(training.device)
        started = time.perf_counter()
        training.step(fed, clips_per_pass, num_kept)
        synchronize(training.device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def largest_in_one_pass(training: Training, shapes: Shapes, sizes: Sequence[int]) -> tuple[int, float, float | None]:
    """(clips, seconds a step, peak GiB) of the largest size that fits."""
    for num_clips in sizes:
        try:
            fed = batches(shapes, training.device, num_clips, 1)[0]
            training.release()
            if training.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            time_step(training, fed, count=2)
            return num_clips, time_step(training, fed, count=5), peak_gib(training.device)
        except torch.OutOfMemoryError:
            training.release()
    raise RuntimeError(f"not even {sizes[-1]} clips fit in {CAP_GIB} GiB")


def loss_gib(training: Training, fed: FedBatch) -> float:
    """GiB that the loss over the whole batch takes, embeddings given."""
    device, width = training.device, training.model.audio_head.out_features
    if device.type != "cuda":
        return 0.0
    training.release()
    counts = (fed.batch.num_clips, fed.batch.num_texts, fed.batch.num_terms)
    audio_BE, text_TE, term_LE = (
        F.normalize(torch.randn(n, width, device=device), dim=1).requires_grad_() for n in counts
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training.share(fed, Encoded(audio_BE, text_TE, term_LE, None)).backward()
    taken = (torch.cuda.max_memory_allocated() - before) / 2**30
    del audio_BE, text_TE, term_LE
    training.release()
    return taken


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """The two-pass step beside one pass and the naive two-pass step."""
    device, shapes = bench_device(), Shapes.of(tiny)
    num_clips = 16 if tiny else NUM_CLIPS
    found = Findings(f"contrastive batch of {num_clips:,} clips under {CAP_GIB:.0f} GiB, one GPU")
    cap_memory(CAP_GIB, device)
    torch.manual_seed(0)
    training = Training(build(shapes, device))
    cosine = check_gradient(training, batches(shapes, device, 8 if tiny else 48, 1)[0], 3 if tiny else 16)
    found.check("gradient in two passes, cosine to one pass", cosine, LEAST_COSINE)
    training.release()
    base_gib = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0

    clips, one_pass_s, peak = largest_in_one_pass(training, shapes, (4, 2) if tiny else ONE_PASS_CLIPS)
    one_pass_rate = clips / one_pass_s
    training.release()
    found.rows.append({"step": "one pass", "clips": clips, "a pass": clips, "s": one_pass_s, "clips/s": one_pass_rate,
                       "of one pass": 1.0, "GiB": peak})  # fmt: skip
    fed = many_clips(num_clips, shapes, device)
    of_loss_gib = loss_gib(training, fed)
    chunk = clips
    if peak is not None:
        room = room_bytes(CAP_GIB, training.model)
        assert room is not None
        audio_tokens, text_tokens = (count / num_clips for count in count_tokens(fed))
        fitting = clips_in(
            *costs(training.model), audio_tokens, text_tokens, (room - of_loss_gib * 2**30) / GRAPHS_SPREAD
        )
        chunk = min(clips, max(16, fitting // 16 * 16))
    some = many_clips(min(num_clips, NUM_DRAWN), shapes, device)
    time_step(training, some, chunk, count=2)  # captures the graphs: all waveforms are among these
    for name, num_kept in (("two passes", 1), ("naive two passes", 0)):
        seconds = time_step(training, some, chunk, num_kept)
        rate = some.batch.num_clips / seconds
        found.rows.append({"step": name, "clips": some.batch.num_clips, "a pass": chunk, "s": seconds, "clips/s": rate,
                           "of one pass": rate / one_pass_rate})  # fmt: skip
    del some
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = num_captures(training)
    seconds = time_step(training, fed, chunk)
    ratio = num_clips / seconds / one_pass_rate
    peak = peak_gib(device)
    found.rows.append({"step": "two passes", "clips": num_clips, "a pass": chunk, "s": seconds,
                       "clips/s": num_clips / seconds, "of one pass": ratio, "GiB": peak})  # fmt: skip
    found.check("clips a second, of one pass", ratio, LEAST_RATIO)
    found.check("peak GiB", peak, CAP_GIB, "at most")
    found.notes.append(f"CUDA graphs: {num_captures(training) - before} were captured in the step over all clips")
    found.notes.append(f"the loss over {num_clips:,} clips takes {of_loss_gib:.2f} GiB, the model {base_gib:.1f} GiB")
    return found


if __name__ == "__main__":
    sys.exit(run_alone(measure))
