"""Who may call agentflow: tenants, by their API keys; handlers learn only the tenant."""

from __future__ import annotations

from collections.abc import Mapping

from covey.auth import ApiKeys, Scope
from covey.errors import Unauthenticated
from covey.net.rpc import Call
from covey.types.ids import TenantId

TENANT_HEADER = "x-covey-tenant"
AUTHORIZATION = "authorization"


class TenantGate:
    """A `Gatekeeper` of `covey.net.rpc`: puts the tenant of a call's key in place of the key."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    def admit(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        principal = self._keys.authenticate(headers.get(AUTHORIZATION))
        principal.require(Scope.INFERENCE)
        rest = {name: value for name, value in headers.items() if name not in (AUTHORIZATION, TENANT_HEADER)}
        return rest | {TENANT_HEADER: principal.tenant}


def tenant_of(call: Call) -> TenantId:
    """Return the tenant that the gate found. Raises `Unauthenticated` on a server without one."""
    tenant = call.headers.get(TENANT_HEADER)
    if not tenant:
        raise Unauthenticated("the API key is missing or wrong: send `Authorization: Bearer <key>`")
    return TenantId(tenant)
