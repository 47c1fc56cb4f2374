"""The file of learnt decisions: plain numbers by category, written by `calibrate` and read when the service starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from covey.errors import DataCorrupt, InvalidArgument
from covey.policy.evidence import FEATURES, Rarity
from covey.policy.reuse import CategoryPolicy
from covey.policy.reuse_model import DecisionModel

SCHEMA = 1
FILE_BYTES_MAX = 64 * 1_048_576


class LearntCategory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One category's decision; `right` and `false` are hits per 100 questions of the labelled ones it was learnt on."""

    weights: dict[str, float]
    typical: dict[str, float]
    intercept: float
    cut: float
    relaxed_cut: float
    floor: float
    texts: int
    words: dict[str, int]
    """How many of the texts have a word of each hashed bucket."""
    right: float = 0.0
    false: float = 0.0


class LearntFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of them, and the encoder whose similarities they weigh."""

    encoder: str
    categories: dict[str, LearntCategory]
    schema: int = SCHEMA


def to_learnt(model: DecisionModel, *, right: float, false: float) -> LearntCategory:
    """A model as it is written."""
    return LearntCategory(
        weights=dict(zip(FEATURES, model.weights, strict=True)),
        typical=dict(zip(FEATURES, model.typical, strict=True)),
        intercept=model.intercept,
        cut=model.cut,
        relaxed_cut=model.relaxed_cut,
        floor=model.floor,
        texts=model.rarity.texts,
        words={str(bucket): count for bucket, count in sorted(model.rarity.counts.items())},
        right=right,
        false=false,
    )


def to_model(learnt: LearntCategory) -> DecisionModel:
    """A model from what was written; raises `ValueError` or `KeyError` for one that this release cannot use."""
    if set(learnt.weights) != set(FEATURES) or set(learnt.typical) != set(FEATURES):
        raise ValueError("the features are not this release's: learn again")
    return DecisionModel(
        weights=tuple(learnt.weights[name] for name in FEATURES),
        typical=tuple(learnt.typical[name] for name in FEATURES),
        intercept=learnt.intercept,
        cut=learnt.cut,
        relaxed_cut=learnt.relaxed_cut,
        floor=learnt.floor,
        rarity=Rarity(learnt.texts, {int(bucket): count for bucket, count in learnt.words.items()}),
    )


def write_learnt(path: Path, found: LearntFile) -> None:
    """Write the file in one piece; raises `OSError`."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    draft.replace(path)


def read_learnt(path: Path, encoder: str) -> dict[str, DecisionModel]:
    """Return the models of the file by category.

    Raises:
        InvalidArgument: there is no such file, or it was learnt with another encoder.
        DataCorrupt: it is no such file, or of another release.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise DataCorrupt(f"{path} is too large for a file of learnt decisions", field="learnt")
        found = msgspec.json.decode(path.read_bytes(), type=LearntFile)
        models = {name: to_model(learnt) for name, learnt in found.categories.items()}
    except OSError as error:
        raise InvalidArgument(f"cannot read the learnt decisions: {error}", field="learnt") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise DataCorrupt(f"{path} has no usable decisions: {error}", field="learnt") from error
    if found.schema != SCHEMA:
        raise DataCorrupt(f"{path} is of schema {found.schema}, not {SCHEMA}: learn again", field="learnt")
    if found.encoder != encoder:
        raise InvalidArgument(f"{path} was learnt with the encoder {found.encoder}, not {encoder}", field="learnt")
    return models


def with_models(
    policies: Iterable[CategoryPolicy], models: Mapping[str, DecisionModel], guarded: frozenset[str]
) -> tuple[CategoryPolicy, ...]:
    """Give each category its model; its guard is then part of the evidence, unless the category is in `guarded`."""
    return tuple(
        replace(policy, model=models[policy.name], guard=policy.name in guarded) if policy.name in models else policy
        for policy in policies
    )
