"""`covey codebook` over a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from covey.cli.codebook import codebook
from covey.compression import Codebook
from covey.errors import InvalidArgument
from tests.support.tiny_llama import write_tiny_llama


def test_a_codebook_is_trained_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COVEY_HOME", str(tmp_path / "home"))
    model = write_tiny_llama(tmp_path / "model")
    text, out = tmp_path / "text.txt", tmp_path / "book.pq"
    text.write_text("what is served here, again and again, in many words " * 20)
    arguments = [str(text), "--out", str(out), "--model", str(model), "--tokens", "512"]
    done = CliRunner().invoke(codebook, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    book = Codebook.from_bytes(out.read_bytes())
    assert f"{book.id:016x}" in done.output.replace("\n", "")

    text.write_text("too short")
    with pytest.raises(InvalidArgument, match="longer text"):
        CliRunner().invoke(codebook, arguments, catch_exceptions=False)
