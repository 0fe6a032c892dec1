"""Measurements: each program sets what it measures beside a reference, in one run."""
