"""Authentication: the right key finds its tenant, and every wrong one fails alike."""

from __future__ import annotations

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.auth import ApiKeys, MeshToken, Principal, Scope, chain_root, new_api_key, new_secret
from covey.errors import InvalidArgument, PermissionDenied, Unauthenticated
from covey.types.ids import TenantId

ACME, GLOBEX = TenantId("acme"), TenantId("globex")
ACME_KEY, ACME_NEXT, ADMIN_KEY, GLOBEX_KEY = (f"ck-{name}-0123456789abcdef" for name in ("a", "a2", "adm", "g"))


@pytest.fixture
def keys() -> ApiKeys:
    acme = f"# rotated in May\n{ACME_KEY}\n{ACME_NEXT}   inference\n\n{ADMIN_KEY} inference, admin  # ops\n"
    return ApiKeys({ACME: acme, GLOBEX: GLOBEX_KEY + "\n"})


@pytest.mark.parametrize(
    ("key", "principal"),
    [
        (ACME_KEY, Principal(tenant=ACME)),
        (ACME_NEXT, Principal(tenant=ACME)),
        (ADMIN_KEY, Principal(tenant=ACME, scopes=frozenset({Scope.INFERENCE, Scope.ADMIN}))),
        (GLOBEX_KEY, Principal(tenant=GLOBEX)),
    ],
)
def test_each_key_finds_its_principal(keys: ApiKeys, key: str, principal: Principal) -> None:
    assert keys.authenticate(f"Bearer {key}") == principal
    assert keys.authenticate(f"bearer  {key} ") == principal


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer ",
    ACME_KEY,
    f"Basic {ACME_KEY}",
    f"Bearer {ACME_KEY}x",
    f"Bearer {ACME_KEY[:-1]}",
    f"Bearer {ACME_KEY} {ACME_KEY}",
    f"Bearer {ACME_KEY.upper()}",
    "Bearer \udcff",
    "Bearer " + "x" * 100_000,
]


@pytest.mark.parametrize("header", WRONG)
def test_every_failure_is_the_same_failure(keys: ApiKeys, header: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        keys.authenticate(header)
    with pytest.raises(Unauthenticated) as unknown:
        keys.authenticate("Bearer ck-nobody-0123456789abcdef")
    assert (str(caught.value), caught.value.field) == (str(unknown.value), unknown.value.field)


@given(st.text(max_size=60))
def test_no_random_header_gets_in(header: str) -> None:
    keys = ApiKeys({ACME: ACME_KEY})
    with pytest.raises(Unauthenticated):
        keys.authenticate(f"Bearer {header}")


@pytest.mark.parametrize("header", [None, "Bearer x", f"Bearer {ACME_KEY}", f"Bearer {GLOBEX_KEY}"])
def test_every_look_up_compares_all_keys(keys: ApiKeys, header: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    real = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    try:
        keys.authenticate(header)
    except Unauthenticated:
        pass
    assert len(set(compared)) == len(compared) == 4


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({ACME: "short"}, "16"),
        ({ACME: f"{ACME_KEY} root"}, "known are inference, admin"),
        ({ACME: ACME_KEY, GLOBEX: ACME_KEY}, "used twice"),
    ],
)
def test_a_wrong_key_file_is_refused_without_showing_it(files: dict[TenantId, str], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says) as caught:
        ApiKeys(files)
    assert caught.value.field is not None
    assert ACME_KEY not in str(caught.value)


def test_scopes_are_required_by_name() -> None:
    Principal(tenant=ACME).require(Scope.INFERENCE)
    with pytest.raises(PermissionDenied, match="admin"):
        Principal(tenant=ACME).require(Scope.ADMIN)


def test_keys_are_not_kept_in_clear(keys: ApiKeys) -> None:
    assert ACME_KEY not in repr(vars(keys))


def test_the_mesh_token_matches_itself_and_rotates() -> None:
    old, new = new_secret(), new_secret()
    before, between, after = MeshToken(old), MeshToken(f"{new}\n{old}\n"), MeshToken(new)

    def accepts(server: MeshToken, client: MeshToken) -> bool:
        scheme, _, credential = client.bearer().partition(" ")
        assert scheme == "Bearer"
        return server.matches(credential)

    assert accepts(before, before)
    assert accepts(between, before)
    assert accepts(after, between)
    assert not accepts(after, before)
    assert not after.matches("")
    assert new not in repr(after)


@pytest.mark.parametrize("text", ["", "# nothing", "short"])
def test_a_mesh_token_must_be_there_and_long(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        MeshToken(text)
    assert caught.value.field == "mesh_token_file"


SECRETS = st.binary(min_size=16, max_size=100)


@given(SECRETS, SECRETS, st.text(), st.text())
def test_chain_roots_differ_by_tenant_and_secret(one: bytes, two: bytes, a: str, b: str) -> None:
    root = chain_root(one, TenantId(a))
    assert len(root) == 16
    assert root == chain_root(one, TenantId(a))
    assert (root == chain_root(one, TenantId(b))) == (a == b)
    assert (root == chain_root(two, TenantId(a))) == (one == two)


def test_a_weak_mesh_secret_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        chain_root(b"short", ACME)


def test_new_secrets_are_long_and_new() -> None:
    made = {new_secret() for _ in range(100)} | {new_api_key() for _ in range(100)}
    assert len(made) == 200
    assert min(map(len, made)) >= 43
    ApiKeys({ACME: new_api_key()})
