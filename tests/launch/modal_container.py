"""A container as modal_server.py makes it: Modal's own entrypoint, with a folder in place of the file system's root."""

import os
import runpy
import sys

root = os.environ["CONTAINER_ROOT"]
sys.path.insert(0, f"{root}/root")  # where Modal puts the launched file

import modal_setup  # noqa: E402

for name in ("REPO", "DATA", "RUNS", "CACHE"):
    setattr(modal_setup, name, root + getattr(modal_setup, name))

runpy.run_module("modal._container_entrypoint", run_name="__main__")
