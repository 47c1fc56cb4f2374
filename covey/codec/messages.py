"""Translate between the dataclasses of `covey.types` and the protobuf messages of the same names.

The translation is compiled once a class from its type hints and the message descriptor; field names and
shapes must agree (a test walks them all). Decoding enforces the `Limit` of each field.
"""

from __future__ import annotations

import dataclasses
import types as pytypes
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from importlib import import_module
from typing import Any, TypeVar, cast

from google.protobuf import descriptor_pool, message, message_factory
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from covey.errors import InvalidArgument
from covey.types.limits import KEY, Limit

T = TypeVar("T")
PACKAGE = "covey.v1"
HASH_BYTES = 16
FILES = ("common", "lend", "generate", "block", "kv_state", "kv", "program", "semcache", "flow", "event")

Convert = Callable[[Any], Any]
Check = Callable[[Any, str], None]

for _name in FILES:
    import_module(f"covey.wire.v1.{_name}_pb2")


def encode(value: Any, wire_name: str | None = None) -> bytes:
    """Serialise a dataclass of `covey.types`; `wire_name` names the oneof message of a union."""
    return _encoder(wire_name or type(value).__name__)(value).SerializeToString()  # type: ignore[no-any-return]


def decode(cls: type[T] | Any, data: bytes, wire_name: str | None = None) -> T:
    """Parse and check `data`.

    Raises:
        InvalidArgument: malformed bytes, or a field out of its bounds (names the field's path).
    """
    name = wire_name or cls.__name__
    wire = message_factory.GetMessageClass(descriptor(name))()
    try:
        wire.ParseFromString(data)
    except message.DecodeError as error:
        raise InvalidArgument(f"malformed {name} message") from error
    result: T = _decoder(cast(Any, cls), name)(wire, "")
    return result


def descriptor(name: str) -> Descriptor:
    """The message descriptor of `covey.v1.<name>`."""
    return descriptor_pool.Default().FindMessageTypeByName(f"{PACKAGE}.{name}")


def is_union(hint: Any) -> bool:
    """Whether a hint is a union of message classes, carried as a oneof named `kind`."""
    if typing.get_origin(hint) not in (typing.Union, pytypes.UnionType):
        return False
    return all(dataclasses.is_dataclass(a) for a in typing.get_args(hint))


def optional_of(hint: Any) -> tuple[Any, bool]:
    """Strip `| None`: the inner hint and whether None was allowed."""
    if typing.get_origin(hint) in (typing.Union, pytypes.UnionType):
        args = [a for a in typing.get_args(hint) if a is not type(None)]
        if len(args) == 1:
            return args[0], True
    return hint, False


def _snake(name: str) -> str:
    return "".join(("_" if c.isupper() and i else "") + c.lower() for i, c in enumerate(name))


# -- encoding ----------------------------------------------------------------


@cache  # bounded by the number of message types
def _encoder(name: str) -> Convert:
    desc = descriptor(name)
    make = message_factory.GetMessageClass(desc)
    if "kind" in desc.oneofs_by_name:
        return _union_encoder(desc, make)
    fields = [(f.name, _field_encoder(f)) for f in desc.fields]

    def run(value: Any) -> Any:
        wire = make()
        for field_name, put in fields:
            item = getattr(value, field_name)
            if item is not None:
                put(wire, item)
        return wire

    return run


def _union_encoder(desc: Descriptor, make: Callable[[], Any]) -> Convert:
    slots = {f.message_type.name: f.name for f in desc.fields if f.message_type is not None}

    def run(value: Any) -> Any:
        kind = type(value).__name__
        wire = make()
        slot = getattr(wire, slots[kind])
        slot.SetInParent()
        slot.CopyFrom(_encoder(kind)(value))
        return wire

    return run


def _field_encoder(field: FieldDescriptor) -> Callable[[Any, Any], None]:
    name = field.name
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return lambda wire, item: getattr(wire, name).update(item)
    if field.message_type is not None:
        inner = field.message_type.name
        if field.is_repeated:
            return lambda wire, items: getattr(wire, name).extend([_encoder(inner)(i) for i in items])
        return lambda wire, item: getattr(wire, name).CopyFrom(_encoder(inner)(item))
    if field.enum_type is not None:
        numbers = {label: number for number, label in _enum_labels(field.enum_type).items()}
        if field.is_repeated:
            return lambda wire, items: getattr(wire, name).extend([numbers[item.name] for item in items])
        return lambda wire, item: setattr(wire, name, numbers[item.name if isinstance(item, Enum) else item])
    if field.is_repeated:
        return lambda wire, items: getattr(wire, name).extend(items)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return lambda wire, item: setattr(wire, name, item if type(item) is bytes else _packed(item, name))
    return lambda wire, item: setattr(wire, name, item)


def _packed(hashes: tuple[bytes, ...] | bytes, name: str) -> bytes:
    """Put hashes in a row: one field of bytes costs a fraction of as many small ones."""
    data = b"".join(hashes) if isinstance(hashes, tuple) else bytes(hashes)
    if isinstance(hashes, tuple) and len(data) != HASH_BYTES * len(hashes):
        raise InvalidArgument(f"{name}: a hash has {HASH_BYTES} bytes", field=name)
    return data


def _enum_labels(desc: EnumDescriptor) -> dict[int, str]:
    prefix = _snake(desc.name).upper() + "_"
    return {v.number: v.name.removeprefix(prefix) for v in desc.values if v.number}


# -- decoding ----------------------------------------------------------------


@cache  # bounded by the number of message types
def _decoder(cls: Any, name: str) -> Callable[[Any, str], Any]:
    desc = descriptor(name)
    if is_union(cls):
        return _union_decoder(cls, desc)
    hints = typing.get_type_hints(cls)
    readers = [_field_reader(f, hints[f.name], desc.fields_by_name[f.name]) for f in dataclasses.fields(cls)]

    def run(wire: Any, path: str) -> Any:
        values = {}
        for field_name, read in readers:
            value = read(wire, path)
            if value is not dataclasses.MISSING:
                values[field_name] = value
        return cls(**values)

    return run


def _union_decoder(union: Any, desc: Descriptor) -> Callable[[Any, str], Any]:
    members = {_slot(desc, member.__name__): member for member in typing.get_args(union)}

    def run(wire: Any, path: str) -> Any:
        slot = wire.WhichOneof("kind")
        if slot is None:
            raise InvalidArgument(f"{path or desc.name}: none of {', '.join(members)} is set", field=path or "kind")
        member = members[slot]
        return _decoder(member, member.__name__)(getattr(wire, slot), _join(path, slot))

    return run


def _slot(desc: Descriptor, message_name: str) -> str:
    return next(f.name for f in desc.fields if f.message_type is not None and f.message_type.name == message_name)


def _field_reader(field: Any, hint: Any, wire_field: FieldDescriptor) -> tuple[str, Callable[[Any, str], Any]]:
    inner, nullable = optional_of(hint)
    name = field.name
    has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    convert = _value_reader(inner, wire_field)
    check = _checker(field.metadata.get(KEY))

    def read(wire: Any, path: str) -> Any:
        here = _join(path, name)
        if wire_field.has_presence and not wire.HasField(name):
            if has_default:
                return dataclasses.MISSING
            if nullable:
                return None
            raise InvalidArgument(f"{here}: is required", field=here)
        value = convert(getattr(wire, name), here)
        check(value, here)
        return value

    return name, read


def _value_reader(hint: Any, wire_field: FieldDescriptor) -> Callable[[Any, str], Any]:
    origin = typing.get_origin(hint)
    if origin is tuple and not wire_field.is_repeated:
        return _unpacked
    if origin is tuple:
        item = _item_reader(typing.get_args(hint)[0], wire_field)
        if item is None:
            return lambda wire, _: tuple(wire)
        return lambda wire, path: tuple(item(w, f"{path}[{i}]") for i, w in enumerate(wire))
    if origin is Mapping:
        return lambda wire, _: dict(wire)
    return _item_reader(hint, wire_field) or (lambda wire, _: wire)


def _unpacked(data: bytes, path: str) -> tuple[bytes, ...]:
    if len(data) % HASH_BYTES:
        raise InvalidArgument(f"{path}: a hash has {HASH_BYTES} bytes", field=path)
    return tuple([data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)])


def _item_reader(hint: Any, wire_field: FieldDescriptor) -> Callable[[Any, str], Any] | None:
    if wire_field.message_type is not None:
        name = wire_field.message_type.name
        return lambda wire, path: _decoder(hint, name)(wire, path)  # noqa: PLW0108 - compiled on first use: types refer to each other
    if wire_field.enum_type is None:
        return None
    labels = _enum_labels(wire_field.enum_type)
    as_enum = isinstance(hint, type) and issubclass(hint, Enum)

    def read(wire: int, path: str) -> Any:
        if wire not in labels:
            raise InvalidArgument(f"{path}: unknown value {wire}; known are {', '.join(labels.values())}", field=path)
        return hint[labels[wire]] if as_enum else labels[wire]

    return read


def _checker(limit: Limit | None) -> Check:
    if limit is None:
        return lambda _value, _path: None

    def check(value: Any, path: str) -> None:
        if limit.size is not None and len(value) > limit.size:
            raise InvalidArgument(f"{path}: holds {len(value)}, at most {limit.size} allowed", field=path)
        if limit.low is not None and not value >= limit.low:  # `not >=` refuses NaN too
            raise InvalidArgument(f"{path}: must be at least {limit.low:g}", field=path)
        if limit.high is not None and not value <= limit.high:
            raise InvalidArgument(f"{path}: must be at most {limit.high:g}", field=path)

    return check


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
