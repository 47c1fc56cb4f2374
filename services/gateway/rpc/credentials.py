"""Who may call the gRPC edge: tenants by API key, services of the mesh by its token and the tenant they act for."""

from __future__ import annotations

from collections.abc import Mapping

from covey.auth import ApiKeys, MeshToken
from covey.errors import InvalidArgument, Unauthenticated
from covey.net.rpc import Call
from covey.types.ids import TenantId

AUTHORIZATION = "authorization"
TENANT_HEADER = "x-covey-tenant"
TENANT_CHARS_MAX = 128


class EdgeCredentials:
    """A `Gatekeeper`: only what it writes under `x-covey-tenant` reaches handlers, never a caller's own claim."""

    def __init__(self, keys: ApiKeys, mesh_token: MeshToken | None) -> None:
        self._keys = keys
        self._mesh_token = mesh_token

    def admit(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers with the caller's tenant. Raises Unauthenticated."""
        authorization = headers.get(AUTHORIZATION)
        seen = {name: value for name, value in headers.items() if name not in (AUTHORIZATION, TENANT_HEADER)}
        claimed = headers.get(TENANT_HEADER, "")
        if claimed and self._is_internal(authorization):
            if len(claimed) > TENANT_CHARS_MAX:
                raise InvalidArgument("the tenant's name is too long", field=TENANT_HEADER)
            return seen | {TENANT_HEADER: claimed}
        return seen | {TENANT_HEADER: self._keys.authenticate(authorization).tenant}

    def _is_internal(self, authorization: str | None) -> bool:
        if self._mesh_token is None:
            return authorization is None  # a mesh without a token is open to whoever reaches its ports
        scheme, _, credential = (authorization or "").partition(" ")
        return scheme.lower() == "bearer" and self._mesh_token.matches(credential)


def tenant_of(call: Call) -> TenantId:
    """The authenticated tenant of a call. Raises Unauthenticated when the server has no gatekeeper."""
    tenant = call.headers.get(TENANT_HEADER, "")
    if not tenant:
        raise Unauthenticated("this call names no tenant")
    return TenantId(tenant)
