"""`python -m covey`: the command line, where its script is not on the path."""

from __future__ import annotations

from covey.cli.main import main

main()
