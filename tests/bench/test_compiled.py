"""Kernels as compiled for GPUs that are not here; in processes of their own, since in this one they are interpreted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = {
    *("_pack", "_extend", "_add_low", "_finish", "_grad_up", "_add_parts"),
    *("_add_norm_forward", "_add_norm_backward", "_pool_norm_forward", "_pool_norm_backward"),
    *("_sequence_mean", "_sequence_mean_backward", "_swiglu_forward", "_swiglu_backward"),
    *("_gather_patches", "_add_positions"),
    *("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"),
    *("tile_sums", "tile_gradient", "bank_tile", "rescore"),
}
FP8_KERNELS = {"_quantise_rows", "_activate", "_activate_backward"}


def test_kernels_fit_ampere_and_hopper_and_move_whole_vectors(tmp_path: Path) -> None:
    path = tmp_path / "compiled.json"
    done = subprocess.run(
        [sys.executable, "bench/compiled.py", "--json", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    for capability, expected in (("8.0", KERNELS), ("9.0", KERNELS | FP8_KERNELS)):
        assert {row["kernel"] for row in found["rows"] if row["capability"] == capability} == expected
    assert [check["is_met"] for check in found["checks"]] == [True] * 3


def test_a_kernel_that_moves_elements_alone_is_found() -> None:
    """The columns of an adapter of rank 5 begin anywhere."""
    code = (
        "from bench import compiled\n"
        "compiled.launches = lambda _: [('r 5', lambda: compiled._lora(1280, 5, 512))]\n"
        "print([kernel.name for _, kernel in compiled.compile_all(90) if kernel.is_narrow])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "['_pack', '_grad_up']", done.stderr
