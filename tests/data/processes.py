"""What processes a program has started."""

from __future__ import annotations

import os

import psutil


def child_processes(parent: int | None = None) -> set[int]:
    """Ids of the children that run; those that only wait to be counted do not."""
    children = psutil.Process(os.getpid() if parent is None else parent).children()
    return {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE}
