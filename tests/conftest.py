"""Fixtures of all tests."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

# Triton decides when a kernel is defined: without a GPU, the kernels' tests run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def log_levels_restored() -> Iterator[None]:
    """Programs set the levels of whole rooms; a later test that reads the log must not depend on which ran before."""
    names = ["", *logging.root.manager.loggerDict]
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
