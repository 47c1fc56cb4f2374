"""Settings of the agentflow service."""

from __future__ import annotations

from pathlib import Path

import msgspec

from covey.config import CommonConfig, NonNegative, Positive, PositiveInt, TenantConfig
from covey.policy.flow_state import FlowLimits
from covey.types.flow import RetryPolicy


class RetryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a node that states no policy gets."""

    attempts: PositiveInt = 3
    base_s: NonNegative = 0.2
    ceiling_s: NonNegative = 10.0


class Config(CommonConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[agentflow]` table."""

    listen: str = "127.0.0.1:0"
    gateway: str = ""
    """`host:port` of the gateway's gRPC; empty takes one from the registry."""
    blob_dir: str = ""
    """Where values over 16 KiB are kept; empty is `blobs` under `run_dir`."""
    tenants: dict[str, TenantConfig] = {}  # noqa: RUF012 - msgspec copies defaults
    open_runs_max: PositiveInt = 1000
    runs_max: PositiveInt = 20_000
    """Runs that can be listed; over it the oldest finished ones are forgotten."""
    runs_in_memory_max: PositiveInt = 256
    """Finished runs kept whole; others are read again from the journal when asked for."""
    waits_max: PositiveInt = 512
    """Values that are awaited from the gateway at once, over all runs."""
    llm_timeout_s: Positive = 600.0
    tool_timeout_s: Positive = 60.0
    run_timeout_s: Positive = 86_400.0
    gateway_patience_s: Positive = 60.0
    """How long a call waits for a gateway that is gone before its attempt fails."""
    tool_beat_s: Positive = 2.0
    """Tool workers send a beat this often; three missed ones are a lost worker."""
    tool_stop_s: Positive = 5.0
    """What a cancelled tool gets to stop."""
    journal_bytes_max: PositiveInt = 2 * 1024**3
    retry: RetryConfig = RetryConfig()

    def limits(self) -> FlowLimits:
        """Bounds for what a workflow leaves open."""
        retry = RetryPolicy(attempts=self.retry.attempts, base_s=self.retry.base_s, ceiling_s=self.retry.ceiling_s)
        return FlowLimits(
            llm_timeout_s=self.llm_timeout_s,
            tool_timeout_s=self.tool_timeout_s,
            run_timeout_s=self.run_timeout_s,
            retry=retry,
        )

    def blob_path(self) -> Path:
        """The directory of the blob store."""
        return Path(self.blob_dir) if self.blob_dir else Path(self.run_dir) / "blobs"
