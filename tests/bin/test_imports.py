"""Programs in bin/ find this repository's packages however they are started, and beside packages of the same names.

torchrun and `python bin/train.py` put bin/ on sys.path, not the repository root, and PyPI has regular packages named
data, model, tests, distributed (Dask's), lora, losses and bin. So each program starts with the same three lines,
BOOTSTRAP below: when run as a file, the root goes first and bin/ comes off. Imported as `bin.train` it leaves sys.path
alone. The lines are spelled out in each program, not imported: a spawned child runs the program's file again with the
parent's repaired sys.path, where a helper module inside bin/ can no longer be found.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "bin"
HOSTILE = ("data", "model", "tests", "distributed", "lora", "losses", "retrieval", "bin", "config", "probe")

BOOTSTRAP = """\
if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]
"""

PROBE = f'''\
import importlib
import json
import multiprocessing
import sys
from pathlib import Path

{BOOTSTRAP}

def origins(queue=None):
    """File of each of our packages, and whether bin/config.py can be had as bare `config` (it must not)."""
    names = ("data", "model", "distributed", "lora", "losses", "retrieval", "bin", "bin.config")
    found = {{name: importlib.import_module(name).__file__ for name in names}}
    here_as = [p for p in sys.path if Path(p).resolve() == Path(__file__).resolve().parent]
    found["bin_on_path"] = here_as
    if queue is not None:
        queue.put(found)
    return found


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=origins, args=(queue,))
    child.start()
    in_child = queue.get(timeout=60)
    child.join()
    print("PROBE " + json.dumps([origins(), in_child]))
'''


def programs() -> list[Path]:
    """Every file of bin/ that can be run."""
    return sorted(p for p in BIN.glob("*.py") if 'if __name__ == "__main__"' in p.read_text(encoding="utf-8"))


@pytest.fixture
def hostile_site(tmp_path: Path) -> Path:
    """A directory of regular packages with our names, each of which raises when imported."""
    site = tmp_path / "hostile_site"
    for name in HOSTILE:
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(f"raise ImportError('the hostile package {name} was imported')\n")
    return site


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository: our rooms' names, bin/config.py and the program bin/probe.py."""
    root = tmp_path / "checkout"
    for name in ("data", "model", "distributed", "lora", "losses", "retrieval", "bin"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").touch()
    (root / "bin" / "config.py").touch()
    (root / "bin" / "probe.py").write_text(PROBE)
    return root


def run(command: list[str], cwd: Path, hostile: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(hostile), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def assert_found_in(done: subprocess.CompletedProcess[str], root: Path) -> None:
    lines = [line for line in done.stdout.splitlines() if line.startswith("PROBE ")]
    assert done.returncode == 0, done.stderr
    assert lines, done.stdout + done.stderr
    for found in json.loads(lines[0].removeprefix("PROBE ")):  # the program itself, then its spawned child
        assert found.pop("bin_on_path") == []
        assert all(Path(file).is_relative_to(root) for file in found.values()), found


@pytest.mark.parametrize("cwd", ["root", "bin", "elsewhere"])
def test_run_as_a_file_from_any_directory(checkout: Path, hostile_site: Path, tmp_path: Path, cwd: str) -> None:
    where = {"root": checkout, "bin": checkout / "bin", "elsewhere": tmp_path}[cwd]
    program = os.path.relpath(checkout / "bin" / "probe.py", where)
    assert_found_in(run([sys.executable, program], where, hostile_site), checkout)


def test_run_as_a_module_from_the_root(checkout: Path, hostile_site: Path) -> None:
    assert_found_in(run([sys.executable, "-m", "bin.probe"], checkout, hostile_site), checkout)


def test_run_through_a_link_and_with_safe_path(checkout: Path, hostile_site: Path, tmp_path: Path) -> None:
    link = tmp_path / "shortcut"
    link.symlink_to(checkout / "bin" / "probe.py")
    assert_found_in(run([sys.executable, str(link)], tmp_path, hostile_site), checkout)
    safe = run([sys.executable, str(checkout / "bin" / "probe.py")], tmp_path, hostile_site, PYTHONSAFEPATH="1")
    assert_found_in(safe, checkout)


def test_bin_named_in_pythonpath_comes_off_too(checkout: Path, hostile_site: Path, tmp_path: Path) -> None:
    both = f"{checkout / 'bin'}{os.pathsep}{hostile_site}"
    assert_found_in(
        run([sys.executable, str(checkout / "bin" / "probe.py")], tmp_path, hostile_site, PYTHONPATH=both), checkout
    )


def test_torchrun_from_elsewhere(checkout: Path, hostile_site: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    assert_found_in(run([*launcher, str(checkout / "bin" / "probe.py")], tmp_path, hostile_site), checkout)


def test_without_the_bootstrap_the_hostile_packages_win(checkout: Path, hostile_site: Path, tmp_path: Path) -> None:
    """The fixture really is hostile: otherwise the tests above would say nothing."""
    probe = checkout / "bin" / "probe.py"
    probe.write_text(PROBE.replace(BOOTSTRAP, "").replace("in_child = queue.get(timeout=60)", "in_child = {}"))
    done = run([sys.executable, str(probe)], tmp_path, hostile_site)
    assert done.returncode != 0
    assert "the hostile package data was imported" in done.stderr


def test_importing_a_program_leaves_sys_path_alone(checkout: Path, tmp_path: Path) -> None:
    code = "import sys; before = list(sys.path); import bin.probe; assert sys.path == before, (before, sys.path)"
    done = run([sys.executable, "-c", code], tmp_path, checkout)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", programs(), ids=lambda p: p.name)
def test_every_program_starts_with_the_shared_lines(program: Path) -> None:
    source = program.read_text(encoding="utf-8")
    assert BOOTSTRAP in source, f"{program.name}: copy the three lines of BOOTSTRAP from tests/bin/test_imports.py"
    early: list[str] = []
    for node in ast.parse(source[: source.index(BOOTSTRAP)]).body:
        if isinstance(node, ast.Import):
            early += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            early.append(node.module or ".")
    early = [name for name in early if name.split(".")[0] not in sys.stdlib_module_names]
    assert not early, f"{program.name}: only the standard library may be imported first, not {early}"


@pytest.mark.parametrize("program", programs(), ids=lambda p: p.name)
def test_every_program_shows_its_help_beside_hostile_packages(
    program: Path, hostile_site: Path, tmp_path: Path
) -> None:
    done = run([sys.executable, str(program), "--help"], tmp_path, hostile_site)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_no_file_of_bin_hides_a_standard_module() -> None:
    """bin/ is on the path until the shared lines have run, so a bin/queue.py would break the interpreter itself."""
    assert not {p.stem for p in BIN.glob("*.py")} & sys.stdlib_module_names
