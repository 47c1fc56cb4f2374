"""compose.yaml is clean, and its very commands serve a request when run as processes on loopback."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from covey.testing import assert_eventually, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ROLES = ("gateway", "prefill", "decode", "kvstore", "semcache", "agentflow")
VOLUMES = ("/run/covey", "/var/cache/covey", "/shm", "/data", "/models")


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
def test_the_file_is_clean() -> None:
    checked = subprocess.run(
        ["docker-compose", "-f", "compose.yaml", "config", "-q"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_every_role_has_an_image_a_health_check_and_waits_for_its_secrets() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for role in ROLES:
        service = SERVICES[role]
        assert service["build"]["target"] in targets
        assert service["healthcheck"]["test"]
        assert "init" in service["depends_on"]
    for role in ("prefill", "decode"):
        device = SERVICES[role]["deploy"]["resources"]["reservations"]["devices"][0]
        assert device["capabilities"] == ["gpu"]
    shared = [role for role in ROLES if any(v.startswith("arena:") for v in SERVICES[role]["volumes"])]
    assert set(shared) == {"prefill", "decode", "kvstore"}


class Loopback:
    """The stack as processes: service names become 127.0.0.1, ports free ones, volumes folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports: dict[str, int] = {}

    def translate(self, text: str) -> str:
        """One word of a command or environment."""
        for volume in VOLUMES:
            text = re.sub(rf"(?<![\w/]){volume}(?![\w-])", str(self.folder / volume.strip("/")), text)
        for name in SERVICES:
            text = re.sub(rf"(?<=//){name}(?=:)", "127.0.0.1", text)
        return re.sub(r"(0\.0\.0\.0|127\.0\.0\.1):(\d+)", lambda m: f"127.0.0.1:{self.port(m[2])}", text)

    def port(self, written: str) -> int:
        return self.ports.setdefault(written, free_port())

    def command(self, name: str) -> list[str]:
        """What the container would run: the image's entry point, unless the service has its own."""
        service = SERVICES[name]
        entry = service.get("entrypoint") or ["python", "-P", "-m", f"services.{name}"]
        words = [self.translate(word) for word in [*entry, *service.get("command", [])]]
        program = {"python": [sys.executable], "covey": [sys.executable, "-m", "covey"]}[words[0]]
        return [*program, *words[1:]]

    def environment(self, name: str) -> dict[str, str]:
        given: dict[str, str] = SERVICES[name].get("environment", {})
        return {**os.environ, **{key: self.translate(str(value)) for key, value in given.items()}}

    def healthy(self, name: str) -> bool:
        words = [self.translate(word) for word in SERVICES[name]["healthcheck"]["test"][1:]]
        return subprocess.run([sys.executable, *words[1:]], capture_output=True, check=False).returncode == 0

    @contextmanager
    def running(self, name: str, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        log = (self.folder / f"{name}.log").open("wb")
        process = subprocess.Popen(command, env=self.environment(name), stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()


async def test_its_commands_serve_a_request_on_loopback(tmp_path: Path) -> None:
    stack = Loopback(tmp_path)
    for volume in VOLUMES:
        (tmp_path / volume.strip("/")).mkdir(mode=0o700, parents=True)
    subprocess.run(stack.command("init"), check=True, env=stack.environment("init"), capture_output=True)
    config = tmp_path / "run" / "covey" / "nats.conf"
    # The server's own file names ports and folders of its container, as the commands do.
    config.write_text(re.sub(r"\b(4222|8222)\b", lambda m: str(stack.port(m[1])), stack.translate(config.read_text())))
    server = Path(sys.executable).with_name("nats-server")
    with ExitStack() as processes:
        processes.enter_context(
            stack.running("nats", [str(server), *map(stack.translate, SERVICES["nats"]["command"])])
        )
        url = f"http://127.0.0.1:{stack.port('8222')}/healthz"
        await assert_eventually(lambda: _answers(url), timeout_s=20)
        for role in ROLES:
            processes.enter_context(stack.running(role, stack.command(role)))
        for role in ROLES:
            await assert_eventually(partial(stack.healthy, role), timeout_s=90, every_s=0.5)  # each is a process
        edge = f"http://127.0.0.1:{stack.port('8000')}"
        await assert_eventually(lambda: _answers(f"{edge}/readyz"), timeout_s=60)
        key = (tmp_path / "run" / "covey" / "api.key").read_text()
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": "Name a colour."}],
            "max_tokens": 4,
            "cache": "bypass",
        }
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{edge}/v1/chat/completions", json=body, headers=headers, timeout=60, trust_env=False)
        assert answer.status_code == httpx.codes.OK, answer.text
        assert answer.json()["choices"][0]["message"]["content"]


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
