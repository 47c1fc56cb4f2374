"""Types, proto and error table say the same thing, and every message survives the wire."""

from __future__ import annotations

import dataclasses
import inspect
import struct
import typing
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import descriptor_pool
from hypothesis import given, settings
from hypothesis import strategies as st

from covey import errors
from covey.codec import decode, encode
from covey.codec.messages import FILES, descriptor, is_union, optional_of
from covey.codec.methods import SERVICES, BidiStream, ClientStream, ServerStream, methods_of
from covey.types.block import BlockCodec, BlockLocation, BlockLocations
from covey.types.generate import Event, GenerateRequest, KvScope, Sampling, Tokens
from covey.types.ids import BlockHash, LeaseId, NamespaceId, RequestId, TenantId
from covey.types.kv import GetRequest
from covey.types.limits import KEY

MODULES: list[ModuleType] = [import_module(f"covey.types.{name}") for name in FILES]
MESSAGES = [
    cls
    for module in MODULES
    for cls in vars(module).values()
    if inspect.isclass(cls) and cls.__module__ == module.__name__ and dataclasses.is_dataclass(cls)
]
ENUMS = [
    cls
    for module in MODULES
    for cls in vars(module).values()
    if inspect.isclass(cls) and cls.__module__ == module.__name__ and issubclass(cls, Enum)
]


def _file(name: str) -> Any:
    return descriptor_pool.Default().FindFileByName(f"covey/wire/v1/{name}.proto")


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda c: c.__name__)
def test_a_dataclass_and_its_message_have_the_same_fields_in_the_same_order(cls: type) -> None:
    wire = descriptor(cls.__name__)
    assert [f.name for f in dataclasses.fields(cls)] == [f.name for f in wire.fields]


def test_every_message_of_proto_has_a_type() -> None:
    known = {c.__name__ for c in MESSAGES} | {c.__name__ for c in ENUMS}
    unions = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if is_union(value) and name in _file(module.__name__.rsplit(".", 1)[1]).message_types_by_name
    }
    for name in FILES:
        wire = _file(name)
        assert set(wire.message_types_by_name) <= known | unions
        assert set(wire.enum_types_by_name) <= known | {"ErrorCode"}


@pytest.mark.parametrize("cls", ENUMS, ids=lambda c: c.__name__)
def test_an_enum_and_its_wire_form_have_the_same_members(cls: type[Enum]) -> None:
    values = descriptor_pool.Default().FindEnumTypeByName(f"covey.v1.{cls.__name__}").values
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    assert [v.name.removeprefix(prefix) for v in values][1:] == [m.name for m in cls]


def test_the_error_table_and_the_proto_enum_are_equal() -> None:
    values = descriptor_pool.Default().FindEnumTypeByName("covey.v1.ErrorCode").values
    assert {v.name.removeprefix("ERROR_CODE_") for v in values if v.number} == set(errors.TABLE)


@pytest.mark.parametrize("service", SERVICES, ids=lambda s: s.__name__)
def test_the_method_table_and_the_proto_service_are_equal(service: type) -> None:
    wire = descriptor_pool.Default().FindServiceByName(f"covey.v1.{service.__name__}")
    declared = methods_of(service)
    assert [m.name for m in declared] == [m.name for m in wire.methods]
    for ours, theirs in zip(declared, wire.methods, strict=True):
        assert (ours.request_name or ours.request.__name__) == theirs.input_type.name
        assert (ours.reply_name or ours.reply.__name__) == theirs.output_type.name
        assert isinstance(ours, (ClientStream, BidiStream)) == theirs.client_streaming
        assert isinstance(ours, (ServerStream, BidiStream)) == theirs.server_streaming


def _values(hint: Any, field: dataclasses.Field[Any], wire: Any) -> st.SearchStrategy[Any]:
    inner, nullable = optional_of(hint)
    base = _plain(inner, field, wire)
    return st.none() | base if nullable else base


def _plain(hint: Any, field: dataclasses.Field[Any], wire: Any) -> st.SearchStrategy[Any]:
    limit = field.metadata.get(KEY)
    origin = typing.get_origin(hint)
    hint = getattr(hint, "__supertype__", hint)
    if origin is tuple and not wire.is_repeated:  # hashes, in a row
        return st.lists(st.binary(min_size=16, max_size=16), max_size=3).map(tuple)
    if origin is tuple:
        return st.lists(_plain(typing.get_args(hint)[0], field, wire), max_size=2).map(tuple)
    if origin is Mapping:
        key, value = typing.get_args(hint)
        return st.dictionaries(_plain(key, field, wire), _plain(value, field, wire), max_size=2)
    if is_union(hint):
        return st.one_of([_messages(member) for member in typing.get_args(hint)])
    if dataclasses.is_dataclass(hint):
        return _messages(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(list(hint))
    if wire.enum_type is not None:
        return st.sampled_from([v.name.removeprefix("ERROR_CODE_") for v in wire.enum_type.values if v.number])
    if hint is bool:
        return st.booleans()
    low = int(limit.low) if limit and limit.low is not None else 0
    high = int(limit.high) if limit and limit.high is not None else 2**31 - 1
    if hint is int:
        return st.integers(low, max(low, high))
    if hint is float:
        return st.floats(max(low, limit.low if limit and limit.low is not None else 0.0), high, allow_nan=False)
    if hint in (bytes, bytes | memoryview):
        return st.binary(max_size=16)
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def _locations(draw: st.DrawFn) -> BlockLocations:
    count, encoded = draw(st.integers(0, 3)), draw(st.booleans())
    word = st.binary(min_size=8 * count, max_size=8 * count)
    return BlockLocations(
        hashes=draw(st.binary(min_size=16 * count, max_size=16 * count)),
        codecs=bytes(draw(st.integers(1, len(BlockCodec))) for _ in range(count)) if encoded else b"",
        offsets=draw(word),
        generations=draw(word),
        digests=draw(word),
        sizes=draw(word) if encoded else b"",
    )


def _messages(cls: Any) -> st.SearchStrategy[Any]:
    if cls is BlockLocations:
        return _locations()
    hints = typing.get_type_hints(cls)
    wire = descriptor(cls.__name__).fields_by_name
    fields = {f.name: _values(hints[f.name], f, wire[f.name]) for f in dataclasses.fields(cls)}
    return st.builds(cls, **fields)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda c: c.__name__)
def test_any_message_survives_the_wire(cls: type) -> None:
    @given(_messages(cls))
    @settings(max_examples=10, deadline=None, database=None)
    def round_trip(value: Any) -> None:
        assert decode(cls, encode(value)) == value

    round_trip()


def test_locations_are_built_from_their_columns() -> None:
    found = BlockLocations(
        hashes=b"a" * 16 + b"b" * 16, offsets=struct.pack("<2Q", 4096, 1 << 40), generations=struct.pack("<2Q", 7, 8),
        digests=struct.pack("<2Q", 1, (1 << 64) - 1), codecs=bytes([1, 3]), sizes=struct.pack("<2Q", 0, 512),
    )  # fmt: skip
    first = BlockLocation(hash=BlockHash(b"a" * 16), offset=4096, generation=7, digest=1)
    last = BlockLocation(
        hash=BlockHash(b"b" * 16), offset=1 << 40, generation=8, digest=(1 << 64) - 1, codec=BlockCodec.INT8,
        size_bytes=512,
    )  # fmt: skip
    assert list(found) == [first, last]
    assert found[-1] == last
    assert found.names == (first.hash, last.hash)
    assert list(found[1:]) == [last]
    assert found[2:] == found[5:] == BlockLocations()
    with pytest.raises(IndexError):
        found[2]


@pytest.mark.parametrize(
    ("column", "data"), [("offsets", b"x" * 9), ("hashes", b"x" * 15), ("codecs", b"\x09"), ("sizes", b"x" * 7)]
)
def test_locations_whose_columns_disagree_are_refused(column: str, data: bytes) -> None:
    whole = dict.fromkeys(("offsets", "generations", "digests", "sizes"), b"x" * 8)
    whole |= {"hashes": b"h" * 16, "codecs": b"\x01"}
    BlockLocations(**whole)
    with pytest.raises(errors.InvalidArgument):
        BlockLocations(**(whole | {column: data}))


def test_a_row_of_hashes_that_does_not_divide_is_refused_on_both_sides() -> None:
    request = GetRequest(lease=LeaseId("l"), hashes=(BlockHash(b"h" * 16),) * 2)
    data = encode(request)
    decoded: GetRequest = decode(GetRequest, data)
    assert decoded == request
    cut = data.replace(b"\x20" + b"h" * 32, b"\x1f" + b"h" * 31)
    assert cut != data
    with pytest.raises(errors.InvalidArgument):
        encode(dataclasses.replace(request, hashes=(BlockHash(b"short"),)))
    with pytest.raises(errors.InvalidArgument) as refused:
        decoded = decode(GetRequest, cut)
    assert refused.value.field == "hashes"


def test_a_union_survives_the_wire_and_an_empty_one_is_refused() -> None:
    tokens = Tokens(attempt=1, offset=3, ids=(7, 8), text="é", text_offset=2)
    union: Any = Event
    assert decode(union, encode(tokens, "Event"), "Event") == tokens
    with pytest.raises(errors.InvalidArgument):
        decode(union, b"", "Event")


def _request(**changes: Any) -> GenerateRequest:
    base = GenerateRequest(
        request_id=RequestId("r"),
        tenant=TenantId("t"),
        model="m",
        scopes=(),
        token_ids=(1,),
        sampling=Sampling(max_tokens=1),
        deadline_s=1,
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (_request(sampling=Sampling(max_tokens=0)), "sampling.max_tokens"),
        (_request(sampling=Sampling(max_tokens=1, top_p=1.5)), "sampling.top_p"),
        (_request(sampling=Sampling(max_tokens=1, temperature=float("nan"))), "sampling.temperature"),
        (_request(stop=("x",) * 17), "stop"),
        (_request(scopes=(KvScope(namespace=NamespaceId(b"n" * 33), chain_root=b""),)), "scopes[0].namespace"),
        (_request(deadline_s=-1.0), "deadline_s"),
    ],
)
def test_a_field_out_of_bounds_is_refused_by_its_path(request_: GenerateRequest, field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        decode(GenerateRequest, encode(request_))
    assert refused.value.field == field


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, database=None)
def test_garbage_is_refused_by_type_or_parsed_never_anything_else(data: bytes) -> None:
    try:
        value: GenerateRequest = decode(GenerateRequest, data)
    except errors.InvalidArgument:
        return
    assert decode(GenerateRequest, encode(value)) == value


def test_from_code_rebuilds_the_class_and_unknown_codes_are_internal() -> None:
    for code, cls in errors.TABLE.items():
        assert type(errors.from_code(code, "m", field="f")) is cls
    assert type(errors.from_code("SOMETHING_NEW", "m")) is errors.Internal


def test_the_documented_error_table_is_the_real_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    documented = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| code")]
    assert documented == [
        f"| {code} | {cls.grpc} | {cls.http} | {'yes' if cls.retryable else 'no'} |"
        for code, cls in sorted(errors.TABLE.items())
    ]
