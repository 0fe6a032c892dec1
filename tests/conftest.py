"""Fixtures of all tests."""

import logging
import os
from collections.abc import Iterator
from typing import Any

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
    for name in ["", *logging.root.manager.loggerDict]:  # those that the test made as well
        logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))


@pytest.fixture
def interpreter_takes_loaded_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter makes a range's bound with int(array of one), which numpy refuses from 2.4 on."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="patches Triton's interpreter")
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
