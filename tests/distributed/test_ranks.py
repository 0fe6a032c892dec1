"""All checks that need several processes, in few launches."""

import inspect
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def _names(module: str, kind: str) -> list[str]:
    """`module:function` of its checks: those that every rank runs, or those that fork their own ranks."""
    sys.path.insert(0, str(HERE))
    try:
        loaded = __import__(module)
    finally:
        sys.path.remove(str(HERE))
    found = []
    for name, function in vars(loaded).items():
        if inspect.isfunction(function) and function.__module__ == module and not name.startswith("_"):
            own_ranks = getattr(function, "forks_itself", False)
            in_ranks = list(inspect.signature(function).parameters) == ["world", "folder"]
            if own_ranks if kind == "forks itself" else in_ranks:
                found.append(f"{module}:{name}")
    assert found, module
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_checks_in_every_rank(run_ranks, world_size):
    modules = ("checks_collectives", "checks_sync", "checks_checkpoints")
    run_ranks(world_size, *(name for module in modules for name in _names(module, "in every rank")))


@pytest.mark.parametrize(
    "check", _names("checks_processes", "forks itself") + _names("checks_checkpoints", "forks itself")
)
def test_faults(run_ranks, check):
    run_ranks(1, check)
