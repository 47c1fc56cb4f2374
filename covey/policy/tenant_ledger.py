"""What each tenant uses of a store, what it may use, and who is over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from covey.errors import Overloaded
from covey.types.ids import TenantId

QUOTAS_MAX = 65_536


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's part of the store. `quota_bytes` 0: no limit."""

    tenant: TenantId
    number: int
    quota_bytes: int
    used_bytes: int = 0
    pinned_bytes: int = 0
    """What its pins ask to keep, each counted in full."""


class TenantLedger:
    """Accounts by number, for columns. A tenant that uses nothing and has the default quota is forgotten."""

    def __init__(self, quotas: Mapping[TenantId, int], default_bytes: int) -> None:
        self._quotas = dict(quotas)
        self._default_bytes = default_bytes
        self._accounts: dict[TenantId, Account] = {}
        self._by_number: list[Account | None] = []
        self._free: list[int] = []
        self._over: dict[int, None] = {}

    def __getitem__(self, number: int) -> Account:
        account = self._by_number[number]
        assert account is not None, "a forgotten tenant still has blocks"
        return account

    def account(self, tenant: TenantId) -> Account:
        """Return a tenant's account, a new one if there is none."""
        account = self._accounts.get(tenant)
        if account is None:
            number = self._free.pop() if self._free else len(self._by_number)
            account = Account(tenant=tenant, number=number, quota_bytes=self._quota(tenant))
            self._accounts[tenant] = account
            if number == len(self._by_number):
                self._by_number.append(account)
            else:
                self._by_number[number] = account
        return account

    def use(self, account: Account, size_bytes: int) -> None:
        """Count bytes that a tenant takes, or with a negative number gives back."""
        account.used_bytes += size_bytes
        self._settle(account)

    def pin(self, tenant: TenantId, size_bytes: int) -> None:
        """Count bytes that a tenant's pins keep, or with a negative number no longer do."""
        account = self.account(tenant)
        account.pinned_bytes += size_bytes
        self._settle(account)

    def set_quota(self, tenant: TenantId, quota_bytes: int) -> None:
        """Bound a tenant. Raises `Overloaded` when too many tenants have a bound of their own."""
        if tenant not in self._quotas and len(self._quotas) >= QUOTAS_MAX:
            raise Overloaded("too many tenants have a quota of their own")
        self._quotas[tenant] = quota_bytes
        if tenant in self._accounts:
            account = self._accounts[tenant]
            account.quota_bytes = quota_bytes
            self._settle(account)

    def quota_bytes(self, tenant: TenantId) -> int:
        return self._quota(tenant)

    def used_bytes(self, tenant: TenantId) -> int:
        account = self._accounts.get(tenant)
        return account.used_bytes if account is not None else 0

    def pinned_bytes(self, tenant: TenantId) -> int:
        account = self._accounts.get(tenant)
        return account.pinned_bytes if account is not None else 0

    @property
    def over(self) -> tuple[int, ...]:
        """Numbers of the tenants that use more than they may: only after a quota was lowered."""
        return tuple(self._over)

    def check(self, used: Mapping[int, int]) -> None:
        """Assert that the accounts say what blocks say, by number."""
        assert {a.number: a.used_bytes for a in self._accounts.values() if a.used_bytes} == used
        for account in self._accounts.values():
            assert self._by_number[account.number] is account
            assert account.used_bytes or account.pinned_bytes, "an idle account was kept"
            assert (account.number in self._over) == (0 < account.quota_bytes < account.used_bytes)
        assert len(self._accounts) + len(self._free) == len(self._by_number)

    def _quota(self, tenant: TenantId) -> int:
        return self._quotas.get(tenant, self._default_bytes)

    def _settle(self, account: Account) -> None:
        if 0 < account.quota_bytes < account.used_bytes:
            self._over[account.number] = None
        else:
            self._over.pop(account.number, None)
        if not account.used_bytes and not account.pinned_bytes:
            del self._accounts[account.tenant]
            self._by_number[account.number] = None
            self._free.append(account.number)
