"""What speech users hold, one small importer a format; `detect.py` tells which."""
