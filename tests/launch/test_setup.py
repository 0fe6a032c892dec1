"""launch/setup.sh: makes, reuses and explains. pip and venv are stand-ins that write down what they were asked."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A python that records `-m pip install` and `-m venv`, answers `import torch`, and is the real one otherwise.
STAND_IN = f"""#!/usr/bin/env bash
case "$*" in
    "-m pip install"*) echo "$*" >> "$CALLS"; for a in "$@"; do if [[ -r "$a" ]]; then cat "$a" >> "$CALLS"; fi; done
        exit "${{PIP_EXIT:-0}}" ;;
    "-m venv"*) echo "$*" >> "$CALLS"; if [[ -n "${{VENV_EXIT:-}}" ]]; then mkdir -p "$3"; exit "$VENV_EXIT"; fi
        mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-c import torch") ;;
    *sys.executable*) echo "$0" ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""

EXTRAS = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


class Setup:
    """A copy of the files that setup.sh reads, and a stand-in interpreter."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"  # with a blank, as folders have
        (self.root / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for name in ("setup.sh", "constraints.txt"):
            shutil.copy(ROOT / "launch" / name, self.root / "launch")
        self.base = folder / "stand-in"
        self.base.write_text(STAND_IN)
        self.base.chmod(0o755)
        self.calls_file = folder / "calls"
        self.python = self.root / ".venv" / "bin" / "python"

    def __call__(self, *extras: str, cwd: Path | str = "/", **extra_env: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("EARMARK_")}
        env = {**inherited, "PYTHON": str(self.base), "CALLS": str(self.calls_file), **extra_env}
        command = ["bash", str(self.root / "launch" / "setup.sh"), *extras]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)

    @property
    def calls(self) -> str:
        return self.calls_file.read_text() if self.calls_file.exists() else ""


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def test_makes_an_environment_and_prints_only_its_python(setup: Setup) -> None:
    done = setup("test")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{setup.python}\n"
    assert "safetensors>=" in setup.calls
    assert "pytest>=" in setup.calls
    assert f"-c {setup.root}/launch/constraints.txt" in setup.calls


def test_a_second_call_does_nothing_and_is_quick(setup: Setup) -> None:
    setup("test")
    before, start = setup.calls, time.perf_counter()
    again = setup()  # what has the test extra also has everything without it
    assert time.perf_counter() - start < 1
    assert again.stdout == f"{setup.python}\n"
    assert setup.calls == before


@pytest.mark.parametrize("change", ["pyproject.toml", "launch/constraints.txt", "extra", "index"])
def test_a_change_installs_again(setup: Setup, change: str) -> None:
    setup("test")
    before = setup.calls.count("pip install")
    if change == "extra":
        done = setup("modal")
    elif change == "index":
        done = setup("test", EARMARK_TORCH_INDEX="https://mirror.example/cpu")
        assert "--index-url https://mirror.example/cpu torch==" in setup.calls
    else:
        with (setup.root / change).open("a") as file:
            file.write("\n# moved\n")
        done = setup("test")
    assert done.returncode == 0, done.stderr
    assert setup.calls.count("pip install") > before
    known = setup.calls
    assert setup("test").returncode == 0 or change == "index"
    if change == "extra":
        assert setup.calls == known, "the extra that was there before must still count"


def test_another_folder_may_be_named_relative_to_where_one_stands(setup: Setup, tmp_path: Path) -> None:
    done = setup(cwd=tmp_path, EARMARK_VENV="elsewhere")
    assert done.stdout == f"{tmp_path / 'elsewhere' / 'bin' / 'python'}\n"
    assert not (setup.root / ".venv").exists()


def test_an_active_environment_keeps_its_torch(setup: Setup) -> None:
    ask_for(setup, "earmark-nowhere>=1")
    done = setup(EARMARK_VENV="none")
    assert done.returncode == 0, done.stderr
    installed = importlib.metadata.version("torch")  # torch.__version__ may say +cu130 where pip knows of no such thing
    assert f"torch=={installed}\n" in setup.calls
    assert "earmark-nowhere>=1" in setup.calls
    assert "constraints.txt" not in setup.calls
    assert "numpy" not in setup.calls, "what is there is not asked for again"
    assert not (setup.root / ".venv").exists()


def test_an_active_environment_that_has_all_needs_neither_pip_nor_network(setup: Setup) -> None:
    done = setup(EARMARK_VENV="none", PIP_EXIT="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{setup.base}\n"
    assert setup.calls == ""


def test_an_environment_may_be_taken_as_it_is(setup: Setup) -> None:
    ask_for(setup, "earmark-nowhere>=1", "numpy>=1000")
    done = setup(EARMARK_VENV="as-is", PIP_EXIT="1")
    assert (done.returncode, done.stdout) == (0, f"{setup.base}\n"), done.stderr
    assert "not as asked for: earmark-nowhere>=1 numpy>=1000" in done.stderr
    assert setup.calls == ""


def ask_for(setup: Setup, *requirements: str) -> None:
    """Add dependencies to the copy of pyproject.toml."""
    file = setup.root / "pyproject.toml"
    quoted = ", ".join(f'"{r}"' for r in requirements)
    file.write_text(file.read_text().replace("dependencies = [", f"dependencies = [{quoted},", 1))


def test_a_stand_in_of_a_version_manager_is_passed_over(setup: Setup, tmp_path: Path) -> None:
    """`python3` may be on PATH and yet fail when run, as pyenv's does for a version that is not chosen."""
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("python3", "python3.12"):
        (shims / name).write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
        (shims / name).chmod(0o755)
    (shims / "python3.11").symlink_to(setup.base)
    done = setup(PYTHON="", PATH=f"{shims}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{setup.python}\n"


@pytest.mark.parametrize(
    ("case", "message", "remedy"),
    [
        ("no_python", "found none (tried: python3", "set PYTHON="),
        ("wrong_python", "is not a Python 3.11 to 3.13", "Set PYTHON to another one"),
        ("no_venv_module", "could not make a virtual environment", "apt-get install python3-venv"),
        ("pip_fails", "pip could not install", "run the same command again"),
        ("unknown_extra", f"extra 'tets' is not in pyproject.toml; allowed: {', '.join(EXTRAS)}", ""),
        ("broken_environment", "is there, but not as an environment", "Remove it (rm -r"),
        ("full_disk", "has 12 MB free; the environment needs about", "EARMARK_VENV to a folder on another disk"),
    ],
)
def test_failures_name_the_next_step(setup: Setup, tmp_path: Path, case: str, message: str, remedy: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    extras: list[str] = []
    env: dict[str, str] = {"PATH": f"{tools}:{os.environ['PATH']}"}
    if case == "no_python":
        for name in ("python3", "python3.11", "python3.12", "python3.13"):
            (tools / name).symlink_to("/bin/false")
        env["PYTHON"] = ""
    elif case == "wrong_python":
        env["PYTHON"] = "/bin/false"
    elif case == "no_venv_module":
        env["VENV_EXIT"] = "1"
    elif case == "pip_fails":
        env["PIP_EXIT"] = "1"
    elif case == "unknown_extra":
        extras = ["tets"]
    elif case == "broken_environment":
        setup.python.parent.mkdir(parents=True)
    elif case == "full_disk":
        (tools / "df").write_text("#!/bin/sh\necho header\necho '/dev/sda 100 88 12 88% /'\n")
        (tools / "df").chmod(0o755)
    done = setup(*extras, **env)
    assert done.returncode != 0
    assert message in done.stderr
    assert remedy in done.stderr
    assert done.stdout == ""
    if case == "no_venv_module":
        assert not (setup.root / ".venv").exists(), "half an environment must not be left"
    if case == "pip_fails":
        assert setup(*extras, PATH=env["PATH"]).returncode == 0, "the same command must go on from there"


@pytest.mark.parametrize(
    "script", [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"], ids=lambda p: p.name
)
def test_scripts_are_strict_and_parse(script: Path) -> None:
    source = script.read_text(encoding="utf-8")
    assert source.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in source
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert os.access(script, os.X_OK)


def test_quickstart_and_test_use_the_environment_of_setup(setup: Setup) -> None:
    """Both pass the user's arguments on, from any directory."""
    for name in ("quickstart.sh", "test.sh"):
        shutil.copy(ROOT / "launch" / name, setup.root / "launch")
    setup("test")
    setup.python.write_text('#!/bin/sh\necho "$PWD|$OMP_NUM_THREADS|$*"\n')
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("EARMARK_", "OMP_"))}
    env = {**inherited, "CALLS": str(setup.calls_file), "PYTHON": str(setup.base)}

    def run(name: str, *arguments: str) -> list[str]:
        command = ["bash", str(setup.root / "launch" / name), *arguments]
        done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split("|")

    where, threads, arguments = run("quickstart.sh", "--epochs", "1")
    assert where == "/"
    assert int(threads) >= 1
    assert arguments.endswith(f"{setup.root}/bin/train.py --preset quickstart --data_root {setup.root} --epochs 1")
    assert "--nproc_per_node=2" in arguments
    where, _, arguments = run("test.sh", "tests/losses", "-k", "hard")
    assert where == str(setup.root)
    assert arguments == "-m pytest tests/losses -k hard"
