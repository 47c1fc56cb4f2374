"""The files of one mesh: its configuration, secrets, logs, and the directory they live in."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LOCAL_TENANT = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshFiles:
    """Paths under one run directory; `cache_dir` (converted weights) outlives it and is shared by all meshes."""

    run_dir: Path
    cache_dir: Path
    base: Path | None = None
    """A `covey.toml` of the user's, whose tables stand behind the generated ones."""

    @property
    def config(self) -> Path:
        return self.run_dir / "mesh.toml"

    @property
    def api_key_file(self) -> Path:
        return self.run_dir / "api.key"

    def log(self, name: str) -> Path:
        """Where a child's output goes."""
        return self.run_dir / "logs" / f"{name}.log"

    def write(
        self, *, nats_url: str, nats_token_file: Path, models: Mapping[str, str], remotes: Mapping[str, str]
    ) -> None:
        """Create the directories, any missing secret, and the configuration that all children read."""
        for path in (self.run_dir, self.run_dir / "logs", self.cache_dir):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mesh_token = self._secret("mesh.token")
        chain_secret = self._secret("chain.secret")
        self._secret(self.api_key_file.name, prefix="ck-")
        self.config.write_text(
            _toml(
                {
                    "common": {
                        "nats": nats_url,
                        "nats_token_file": str(nats_token_file),
                        "mesh_token_file": str(mesh_token),
                        "run_dir": str(self.run_dir),
                    },
                    "prefill": {"cache_dir": str(self.cache_dir)},
                    "decode": {"cache_dir": str(self.cache_dir)},
                    "gateway": {"mesh_secret_file": str(chain_secret)},
                    f"tenants.{LOCAL_TENANT}": {"key_file": str(self.api_key_file)},
                }
            )
            + "".join(_model(name, source=source) for name, source in models.items())
            + "".join(_model(name, url=url) for name, url in remotes.items())
            + self._users_tables()
        )
        self.config.chmod(0o600)

    def _secret(self, name: str, *, prefix: str = "") -> Path:
        path = self.run_dir / name
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(prefix + secrets.token_urlsafe(32))
        return path

    def _users_tables(self) -> str:
        return "" if self.base is None else "\n" + self.base.read_text()


def _toml(tables: Mapping[str, Mapping[str, str]]) -> str:
    lines = []
    for table, values in tables.items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]  # a JSON string is a TOML string
        lines.append("")
    return "\n".join(lines) + "\n"


def _model(name: str, **values: str) -> str:
    rows = {"name": name, **values}
    return "[[gateway.models]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in rows.items()) + "\n"
