"""Checking what a client submits: names, roles, models, and which variables each call names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b

import msgspec

from covey.errors import InvalidArgument, NotFound
from covey.policy import template
from covey.policy.dag import Node
from covey.types.grammar import read_grammar
from covey.types.program import SemanticCall
from services.gateway.models import Catalog

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


def nodes_of(calls: Sequence[SemanticCall], catalog: Catalog) -> list[Node]:
    """The graph's view of calls.

    Raises:
        InvalidArgument: an empty id, a bad name or role, no messages, or `n` other than 1; names call and field.
        NotFound: no such model.
    """
    return [_node(i, call, catalog) for i, call in enumerate(calls)]


def check_names(variables: Mapping[str, str]) -> None:
    """Raise InvalidArgument for a variable whose name is none."""
    for name in variables:
        if not template.is_name(name):
            raise InvalidArgument(f"{name[:64]!r} cannot name a variable", field="variables")


def _node(i: int, call: SemanticCall, catalog: Catalog) -> Node:
    where = f"calls[{i}]"
    if not call.call_id:
        raise InvalidArgument("a call needs an id", field=f"{where}.call_id")
    if not template.is_name(call.output):
        raise InvalidArgument(
            f"call {call.call_id!r}: {call.output[:64]!r} cannot name a variable", field=f"{where}.output"
        )
    if not call.messages:
        raise InvalidArgument(f"call {call.call_id!r} has no messages", field=f"{where}.messages")
    for message in call.messages:
        if message.role not in ROLES:
            raise InvalidArgument(f"call {call.call_id!r}: no role {message.role!r}", field=f"{where}.messages.role")
    if call.params.n != 1:
        raise InvalidArgument(f"call {call.call_id!r} sets one variable: n must be 1", field=f"{where}.params.n")
    if call.params.grammar:
        _check_grammar(call, where)
    try:
        catalog.find(call.model)
    except NotFound as error:
        raise NotFound(f"call {call.call_id!r}: {error.message}", field=f"{where}.model") from error
    inputs = dict.fromkeys(name for message in call.messages for name in template.names(message.content))
    return Node(call_id=call.call_id, inputs=tuple(inputs), output=call.output, digest=_digest(call))


def _check_grammar(call: SemanticCall, where: str) -> None:
    try:
        read_grammar(call.params.grammar)
    except InvalidArgument as error:
        message = f"call {call.call_id!r}: {error.field}: {error.message}"
        raise InvalidArgument(message, field=f"{where}.params.grammar") from error


def _digest(call: SemanticCall) -> bytes:
    """Equal for equal bodies, in whatever order their maps came."""
    plain = replace(call, params=replace(call.params, logit_bias={}))
    body = msgspec.msgpack.encode((plain, sorted(call.params.logit_bias.items())))
    return blake2b(body, digest_size=16).digest()
