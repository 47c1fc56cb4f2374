"""Scripts of the repository: each runs as `python tools/NAME.py`."""
