"""Launchers are no package: they import one another as files of one folder, and tests do as they do."""

import sys

from tests.launch.standins import ROOT

sys.path.insert(0, str(ROOT / "launch"))
