"""The house rules that a machine can check: layers, lint, types, safe loading, sizes, names, a test for each module.

Each rule is a function from source to the lines that break it, so that the rule itself is tested on a line that does.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("model", "lora", "data", "losses", "distributed", "retrieval", "bin", "bench")
MAX_LINES = 350
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "misc"}

# Settings are dataclasses without behaviour: what reads them tests them.
WITHOUT_OWN_TEST = {
    "model/settings.py",
    "lora/settings.py",
    "losses/settings.py",
    "model/attention_kernels.py",  # launched, and tested, by model/tile_attention.py
    "model/attention_rows.py",  # the same
}


def sources() -> list[Path]:
    """All Python files that are not tests: the rooms, the sample's maker, launchers."""
    folders = [ROOT / name for name in (*ROOMS, "samples", "launch")]
    return sorted(p for folder in folders for p in folder.rglob("*.py"))


def relative(paths: list[Path]) -> list[str]:
    return [p.relative_to(ROOT).as_posix() for p in paths]


def run_tool(*command: str) -> str:
    """What a tool prints when it finds fault, else an empty string."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"{done.stdout}\n{done.stderr}".strip()


def test_rooms_import_only_what_they_may() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    fault = run_tool("-c", code)
    assert not fault, f"lint-imports, contracts in pyproject.toml:\n{fault}"


def test_ruff_finds_nothing() -> None:
    folders = [name for name in (*ROOMS, "samples", "launch", "tests") if (ROOT / name).exists()]
    fault = run_tool("-m", "ruff", "check", "--no-cache", "--output-format=concise", *folders)
    assert not fault, f"ruff check {' '.join(folders)}:\n{fault}"


def test_types_agree() -> None:
    fault = run_tool("-m", "mypy", "--no-error-summary")
    assert not fault, f"mypy, settings in pyproject.toml:\n{fault}"


def test_no_file_is_too_long() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in sources()}
    long = {p.relative_to(ROOT).as_posix(): n for p, n in lengths.items() if n > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines; split by job, not by length: {long}"


def test_no_vague_names_and_none_of_the_standard_library() -> None:
    for path in sources():
        parts = {*path.relative_to(ROOT).parts[:-1], path.stem}
        assert not parts & VAGUE_NAMES, f"{path}: name the job, not {parts & VAGUE_NAMES}"
        assert path.stem not in sys.stdlib_module_names, f"{path}: hides a standard module"
    assert not (ROOT / "launch" / "modal.py").exists(), "launch/modal.py would hide the package modal from launchers"


def own_module_tests() -> Iterator[tuple[str, str]]:
    """(source, the test file that mirrors it) of all modules in the rooms."""
    for path in sources():
        room, *rest = path.relative_to(ROOT).parts
        if room in ROOMS and path.name != "__init__.py":
            yield "/".join((room, *rest)), "/".join(("tests", room, *rest[:-1], f"test_{path.name}"))


def test_tests_mirror_the_rooms() -> None:
    missing = [t for s, t in own_module_tests() if s not in WITHOUT_OWN_TEST and not (ROOT / t).exists()]
    assert not missing, f"modules without their test file: {missing}"
    tests = dict(own_module_tests())
    stale = [name for name in WITHOUT_OWN_TEST if name not in tests or (ROOT / tests[name]).exists()]
    assert not stale, f"WITHOUT_OWN_TEST names modules that do not exist or have their test: {stale}"


def test_what_is_imported_is_declared() -> None:
    """A package that only happens to be installed (by another one, or by hand) is missing on a fresh machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared_lines = [
        *project["dependencies"],
        *(line for e in project["optional-dependencies"].values() for line in e),
    ]
    declared = {re.split(r"[^\w-]", line)[0].lower().replace("_", "-") for line in declared_lines}
    missing: dict[str, list[str]] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module]
            # Launchers lie beside one another without being a package.
            beside = {p.stem for p in path.parent.glob("*.py")} if path.parent.name == "launch" else set()
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - set(ROOMS) - beside:
                if top.lower().replace("_", "-") not in declared:
                    missing.setdefault(top, []).append(path.relative_to(ROOT).as_posix())
    assert not missing, f"imported, but not among pyproject.toml's dependencies or extras: {missing}"


def test_constraints_pin_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "launch" / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    }
    names = {re.split(r"[^\w-]", line)[0].lower().replace("_", "-") for line in wanted}
    assert names <= pins, f"launch/constraints.txt has no version for {sorted(names - pins)}"


# Rules on source text -----------------------------------------------------------------------------------------------


def unsafe_loading(tree: ast.AST) -> list[int]:
    """Lines that could run code from a data file: pickle and its kin, torch.load without weights_only=True."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] in UNSAFE_MODULES for alias in node.names):
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in UNSAFE_MODULES:
                lines.append(node.lineno)
            if node.module == "torch" and any(alias.name == "load" for alias in node.names):
                lines.append(node.lineno)  # would hide a torch.load from this check
        elif isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") is not True:
                lines.append(node.lineno)
            if given.get("allow_pickle", False) is not False:
                lines.append(node.lineno)
    return lines


def torch_distributed_as_bare_name(tree: ast.AST) -> list[int]:
    """Lines that bind torch's module to the name of our own package."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            lines += [node.lineno for alias in node.names if (alias.asname or alias.name) == "distributed"]
        elif isinstance(node, ast.Import):
            lines += [node.lineno for alias in node.names if alias.asname == "distributed"]
    return lines


def silent_excepts(tree: ast.AST) -> list[int]:
    """A bare `except:`, or one that catches everything and does nothing."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            catches_all = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            does_nothing = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
            if node.type is None or (catches_all and does_nothing):
                lines.append(node.lineno)
    return lines


def reentrant_checkpointing(tree: ast.AST) -> list[int]:
    """With a frozen input, reentrant checkpointing gives no gradient at all, and no error."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "checkpoint":
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if given.get("use_reentrant") is not False:
                lines.append(node.lineno)
    return lines


Rule = Callable[[ast.AST], list[int]]
RULES: list[Rule] = [unsafe_loading, torch_distributed_as_bare_name, silent_excepts, reentrant_checkpointing]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_keep_the_rule(rule: Rule) -> None:
    broken = []
    for path in sources():
        lines = rule(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
        broken += [f"{path.relative_to(ROOT).as_posix()}:{line}" for line in lines]
    assert not broken, f"{rule.__doc__} {broken}"


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (unsafe_loading, "import pickle", "import json"),
        (unsafe_loading, "from torch import load", "from torch import Tensor"),
        (unsafe_loading, "torch.load(path)", "torch.load(path, weights_only=True)"),
        (unsafe_loading, "torch.load(path, weights_only=flag)", "safetensors.torch.load_file(path)"),
        (unsafe_loading, "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=False)"),
        (torch_distributed_as_bare_name, "from torch import distributed", "import torch.distributed as dist"),
        (torch_distributed_as_bare_name, "import torch.distributed as distributed", "from distributed import health"),
        (silent_excepts, "try:\n    x()\nexcept:\n    y()", "try:\n    x()\nexcept OSError:\n    pass"),
        (silent_excepts, "try:\n    x()\nexcept Exception:\n    pass", "try:\n    x()\nexcept Exception:\n    raise"),
        (
            reentrant_checkpointing,
            "torch.utils.checkpoint.checkpoint(layer, x)",
            "checkpoint(layer, x, use_reentrant=False)",
        ),
    ],
)
def test_the_rule_sees_what_breaks_it(rule: Rule, bad: str, good: str) -> None:
    assert len(rule(ast.parse(bad))) == 1
    assert not rule(ast.parse(good))


def test_there_is_something_to_check() -> None:
    found = relative(sources())
    assert {"model/audio_tower.py", "retrieval/metrics.py", "bin/__init__.py"} <= set(found), found
