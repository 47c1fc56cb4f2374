"""Names of blocks: the same as `identity.chain`, whatever the pieces in which tokens arrive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.engine.chain import BlockChain, named_by, parents
from covey.errors import InvalidArgument
from covey.policy.identity import chain, tail_key
from covey.types.generate import HandoverTicket, KvScope
from covey.types.ids import NamespaceId, RequestId, WorkerId

PUBLIC = KvScope(namespace=NamespaceId(b"public"), chain_root=b"p", blocks=2)
OWN = KvScope(namespace=NamespaceId(b"own"), chain_root=b"o")


@given(st.lists(st.integers(0, 1000), max_size=40), st.lists(st.integers(0, 40), max_size=4))
def test_growing_a_chain_names_what_one_call_names(tokens: list[int], cuts: list[int]) -> None:
    grown = BlockChain((OWN,), 4)
    for cut in sorted(cuts):
        grown.extend(tokens[:cut])
    grown.extend(tokens)
    assert tuple(name for _, name in grown.keys) == chain(b"o", tokens, 4)


def test_scopes_divide_the_chain() -> None:
    tokens = list(range(19))
    both = BlockChain((PUBLIC, OWN), 4)
    both.extend(tokens)
    assert [namespace for namespace, _ in both.keys] == [b"public"] * 2 + [b"own"] * 2
    assert tuple(name for _, name in both.keys[:2]) == chain(b"p", tokens[:8], 4)
    assert tuple(name for _, name in both.keys[2:]) == chain(b"o", tokens[8:], 4)
    first, second = both.stretches(0, 4)
    assert (first.first, second.first) == (0, 2)
    assert [key.parent == b"" for key in (*first.keys, *second.keys)] == [True, False, True, False]
    assert next(both.stretches(1, 2)).keys == first.keys[1:]


def test_the_tail_is_named_after_its_parent_and_request() -> None:
    tokens = list(range(6))
    own = BlockChain((OWN,), 4)
    own.extend(tokens)
    namespace, key = own.tail(tokens[4:], RequestId("r"), 1)
    assert namespace == b"own"
    assert key.hash == tail_key(own.keys[0][1], tokens[4:], RequestId("r"))
    assert key.parent == own.keys[0][1]
    assert own.tail(tokens[:2], RequestId("r"), 0)[1].parent == b""


def test_scopes_are_checked() -> None:
    with pytest.raises(InvalidArgument):
        BlockChain((), 4)
    with pytest.raises(InvalidArgument):
        BlockChain((OWN, PUBLIC), 4)


def test_a_ticket_names_its_blocks_along_its_scopes() -> None:
    both = BlockChain((PUBLIC, OWN), 4)
    both.extend(list(range(16)))
    ticket = HandoverTicket(
        request_id=RequestId("r"),
        attempt=0,
        source=WorkerId("w"),
        scopes=(PUBLIC, OWN),
        hashes=tuple(name for _, name in both.keys),
        covered=16,
        emitted=(1,),
    )
    assert named_by(ticket) == both.keys
    assert parents(both.keys) == [None, *both.keys[:3]]
