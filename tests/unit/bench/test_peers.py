"""The list of peers is honest: what works has a version, what does not has its reason. No network is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.peers import NOT_SET_UP, Peer, PeerFailed, PeerState, main, python_of, read_state, run_logged, set_up


def write_wheel(folder: Path, name: str, code: str) -> Path:
    """A package of one module, as small as pip takes it."""
    info, path = f"{name}-1.2.dist-info", folder / f"{name}-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", code)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def write_npm(folder: Path, script: str) -> None:
    """An `npm` of our own."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_what_can_be_had_is_installed_once_and_the_rest_is_listed_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / ".peers"
    write_npm(tmp_path / "bin", "echo 'ERROR: nobody-offers-this'; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    good = write_wheel(tmp_path, "goodpeer", "version = '1.2'\n")
    extra = write_wheel(tmp_path, "unwanted", "raise SystemExit('built for something else')\n")
    probe = "import goodpeer, importlib.util as u; assert not u.find_spec('unwanted'); print(goodpeer.version)"
    recipes = (
        Peer(name="good", requirements=("--no-index", str(good), str(extra)), removed=("unwanted",), probe=probe),
        Peer(name="absent", requirements=(), npm=("nobody-offers-this",), probe="print()"),
    )
    assert main(root, recipes) == 0
    assert read_state("good", root) == PeerState(ok=True, version="1.2")
    absent = read_state("absent", root)
    assert not absent.ok
    assert "nobody-offers-this" in absent.reason
    assert json.loads((root / "peers.json").read_text())["absent"]["version"] == ""

    log = root / "good.log"
    log.unlink()
    assert set_up(recipes[0], root) == PeerState(ok=True, version="1.2")
    assert not log.exists(), "the same recipe was installed again"

    (root / "good" / "lib").rename(root / "good" / "lib.gone")
    broken = set_up(recipes[0], root)
    assert not broken.ok
    assert "does not import" in broken.reason


def test_what_npm_brings_lies_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npm(tmp_path / "bin", 'mkdir -p "$5/node_modules/good" && echo "$6" > "$5/node_modules/good/asked"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    probe = "import pathlib, sys; print((pathlib.Path(sys.prefix) / 'node_modules/good/asked').read_text())"
    peer = Peer(name="good", requirements=(), npm=("good@1",), probe=probe)
    assert set_up(peer, tmp_path) == PeerState(ok=True, version="good@1")


def test_without_npm_the_reason_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    state = set_up(Peer(name="good", requirements=(), npm=("good@1",), probe="print()"), tmp_path)
    assert not state.ok
    assert "there is no npm" in state.reason


def test_without_make_peers_the_state_says_to_run_it(tmp_path: Path) -> None:
    assert read_state("vllm", tmp_path) == PeerState(ok=False, reason=NOT_SET_UP)


def test_a_listed_peer_whose_environment_is_gone_is_not_there(tmp_path: Path) -> None:
    peers.write_states({"vllm": PeerState(ok=True, version="9")}, tmp_path)
    assert read_state("vllm", tmp_path) == PeerState(ok=False, reason=NOT_SET_UP)
    python_of("vllm", tmp_path).parent.mkdir(parents=True)
    python_of("vllm", tmp_path).touch()
    assert read_state("vllm", tmp_path) == PeerState(ok=True, version="9")
    assert read_state("other", tmp_path).reason == NOT_SET_UP


@pytest.mark.parametrize("text", ["{", "[]", '{"vllm": {"okay": true}}', '{"vllm": 3}'])
def test_a_broken_list_is_not_believed(text: str, tmp_path: Path) -> None:
    (tmp_path / "peers.json").write_text(text)
    state = read_state("vllm", tmp_path)
    assert not state.ok
    assert "make peers" in state.reason


def test_a_failed_step_is_told_by_its_error_line(tmp_path: Path) -> None:
    code = "print('Collecting x'); print('ERROR: no such thing'); print('bye'); raise SystemExit(1)"
    with pytest.raises(PeerFailed, match="ERROR: no such thing"):
        run_logged("x", [sys.executable, "-c", code], tmp_path / "x.log")
    assert "Collecting x" in (tmp_path / "x.log").read_text()


def test_a_step_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=r"took over 0\.3 s"):
        run_logged("x", [sys.executable, "-c", "import signal; signal.pause()"], tmp_path / "x.log", limit_s=0.3)


def test_a_missing_interpreter_is_a_reason_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    state = set_up(Peer(name="x", requirements=(), probe=""), tmp_path)
    assert not state.ok
    assert "cannot be made" in state.reason


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import peers; print([p.name for p in peers.PEERS])"
    folder = str(Path(peers.__file__).parent)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, folder], capture_output=True, text=True, check=True)
    assert "vllm" in done.stdout
