"""Identifiers: distinct types, so that one kind of id cannot stand where another is meant."""

from __future__ import annotations

from typing import NewType

RequestId = NewType("RequestId", str)
TenantId = NewType("TenantId", str)
ProgramId = NewType("ProgramId", str)
CallId = NewType("CallId", str)
RunId = NewType("RunId", str)
WorkerId = NewType("WorkerId", str)
LeaseId = NewType("LeaseId", str)
NamespaceId = NewType("NamespaceId", bytes)
"""16 bytes: hash of everything that makes KV bytes interchangeable (see `covey.policy.identity`)."""
BlockHash = NewType("BlockHash", bytes)
"""16 bytes: a link of the hash chain over a prefix (see `covey.policy.identity`)."""
