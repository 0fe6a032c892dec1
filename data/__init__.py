"""Clips, glossaries, audio files, batches and the loader. Needs no torch."""
