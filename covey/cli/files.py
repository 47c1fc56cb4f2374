"""The files of one mesh: its configuration, secrets, logs, and the directory they live in."""

from __future__ import annotations

import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from covey.errors import InvalidArgument

LOCAL_TENANT = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshFiles:
    """Paths under one run directory; `cache_dir` (converted weights) outlives it and is shared by all meshes."""

    run_dir: Path
    cache_dir: Path
    base: Path | None = None
    """A `covey.toml` of the user's: what it sets wins over what is generated."""

    @property
    def config(self) -> Path:
        return self.run_dir / "mesh.toml"

    @property
    def api_key_file(self) -> Path:
        return self.run_dir / "api.key"

    @property
    def mesh_token_file(self) -> Path:
        return self.run_dir / "mesh.token"

    def log(self, name: str) -> Path:
        """Where a child's output goes."""
        return self.run_dir / "logs" / f"{name}.log"

    def write(
        self, *, nats_url: str, nats_token_file: Path, models: Mapping[str, str], remotes: Mapping[str, str]
    ) -> None:
        """Create the directories, any missing secret, and the configuration that all children read.

        Raises:
            InvalidArgument: the user's file is not TOML.
        """
        for path in (self.run_dir, self.run_dir / "logs", self.cache_dir):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        generated = {
            "common": {
                "nats": nats_url,
                "nats_token_file": str(nats_token_file),
                "mesh_token_file": str(self._secret(self.mesh_token_file.name)),
                "run_dir": str(self.run_dir),
            },
            "prefill": {"cache_dir": str(self.cache_dir)},
            "decode": {"cache_dir": str(self.cache_dir)},
            "gateway": {
                "mesh_secret_file": str(self._secret("chain.secret")),
                "models": [
                    *({"name": name, "source": source} for name, source in models.items()),
                    *({"name": name, "url": url} for name, url in remotes.items()),
                ],
            },
            "tenants": {LOCAL_TENANT: {"key_file": str(self._secret(self.api_key_file.name, prefix="ck-"))}},
        }
        self.config.touch(mode=0o600)
        self.config.write_text(tomli_w.dumps(_merged(generated, self._users_tables())))

    def _secret(self, name: str, *, prefix: str = "") -> Path:
        path = self.run_dir / name
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(prefix + secrets.token_urlsafe(32))
        return path

    def _users_tables(self) -> dict[str, Any]:
        if self.base is None:
            return {}
        try:
            return tomllib.loads(self.base.read_text())
        except tomllib.TOMLDecodeError as error:
            raise InvalidArgument(f"{self.base} is not valid TOML: {error}", field="config") from error


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merged key by key; anything else of `above` replaces what is below."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
