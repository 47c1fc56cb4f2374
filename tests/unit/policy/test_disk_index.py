"""The index of the disk tier against a plain model of it: closure, bytes, segments, memory."""

from __future__ import annotations

from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from covey.policy.disk_index import DiskIndex, Spot
from covey.policy.disk_record import RECORD_ALIGN
from covey.types.block import BlockCodec
from covey.types.ids import BlockHash, NamespaceId, TenantId

NS = NamespaceId(b"n" * 16)
ALL = tuple(BlockCodec)


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


class DiskIndexMachine(RuleBasedStateMachine):
    """Block n grows from n // 2: a forest with shared trunks."""

    def __init__(self) -> None:
        super().__init__()
        self.index = DiskIndex(blocks_max=24, seed=1)
        self.model: dict[int, tuple[Spot, BlockCodec]] = {}
        self.segment = 0
        self.offset = 0
        self.now = 0.0
        self.roll()

    @rule()
    def roll(self) -> None:
        self.segment, self.offset = self.segment + 1, 0
        self.index.open_segment(self.segment)

    def spot(self, pages: int) -> Spot:
        spot = Spot(self.segment, self.offset, pages * RECORD_ALIGN)
        self.offset += spot.size_bytes
        self.index.grow(self.segment, spot.size_bytes)
        return spot

    @rule(number=st.integers(1, 40), pages=st.integers(1, 4), codec=st.sampled_from(ALL), step=st.floats(0, 10))
    def add(self, number: int, pages: int, codec: BlockCodec, step: float) -> None:
        self.now += step
        parent = name(number // 2) if number > 1 else BlockHash(b"")
        tenant = TenantId(f"t{number % 3}")
        can = self.index.can_add(NS, parent, tenant)
        assert can == (len(self.model) < 24 and (number == 1 or number // 2 in self.model))
        if can:
            spot = self.spot(pages)
            freed = self.index.add(NS, name(number), parent, spot, tenant=tenant, codec=codec, now=self.now)
            assert freed == (self.model[number][0] if number in self.model else None)
            self.model[number] = spot, codec

    def subtree(self, number: int) -> list[int]:
        return [n for n in self.model if any(n >> shift == number for shift in range(7))]

    @rule(number=st.integers(1, 40), by_spot=st.booleans())
    def remove(self, number: int, by_spot: bool) -> None:
        if by_spot and number in self.model:
            gone = self.index.remove_at(self.model[number][0])
        else:
            gone = self.index.remove(NS, name(number))
        going = self.subtree(number) if number in self.model else []
        assert sorted(map(str, gone)) == sorted(str(self.model[n][0]) for n in going)
        for n in going:
            del self.model[n]

    @rule(numbers=st.lists(st.integers(1, 40), max_size=5), codecs=st.sets(st.sampled_from(ALL)))
    def look(self, numbers: list[int], codecs: set[BlockCodec]) -> None:
        found = self.index.prefix(NS, [name(n) for n in numbers], codecs)
        good = [n in self.model and self.model[n][1] in codecs for n in numbers]
        assert found == (good.index(False) if False in good else len(good))
        assert self.index.prefix(NamespaceId(b"m" * 16), [name(n) for n in numbers], ALL) == 0

    @rule(number=st.integers(1, 40), step=st.floats(0, 10))
    def touch(self, number: int, step: float) -> None:
        self.now += step
        self.index.touch(NS, name(number), self.now)

    @precondition(lambda self: len(self.index.segments) > 1)
    @rule(share=st.floats(0, 1))
    def give_up(self, share: float) -> None:
        victim = self.index.victim(self.segment, self.now)
        assert victim is not None
        assert victim != self.segment
        live = [n for n, (spot, _) in self.model.items() if spot.segment == victim]
        budget = int(share * 10 * RECORD_ALIGN)
        kept = self.index.survivors(victim, budget)
        assert sum(spot.size_bytes for spot in kept) <= budget
        numbers = {spot: n for n, (spot, _) in self.model.items()}
        chosen = {numbers[spot] for spot in kept}
        for n in chosen:
            assert n // 2 not in live or n // 2 in chosen or n == 1, "a child was kept without its parent"
            spot = self.spot(self.model[n][0].size_bytes // RECORD_ALIGN)
            assert self.index.move(NS, name(n), self.model[n][0], spot)
            self.model[n] = spot, self.model[n][1]
        before = len(self.model)
        for n in [n for n in live if n not in chosen]:
            for gone in self.subtree(n):
                del self.model[gone]
        assert self.index.drop_segment(victim) == before - len(self.model)

    @invariant()
    def holds(self) -> None:
        self.index.check()
        assert self.index.blocks == len(self.model)
        for n, (spot, _) in self.model.items():
            assert self.index.spot(NS, name(n)) == spot


TestDiskIndex = DiskIndexMachine.TestCase
TestDiskIndex.settings = settings(max_examples=settings().max_examples // 3, stateful_step_count=40, deadline=None)


def test_a_block_takes_less_than_a_hundred_bytes() -> None:
    index = DiskIndex(blocks_max=1 << 20, seed=3)
    index.open_segment(1)
    random, count = Random(5), 20_000
    parent = BlockHash(b"")
    for number in range(count):
        block = BlockHash(random.randbytes(16))
        spot = Spot(1, number * RECORD_ALIGN, RECORD_ALIGN)
        index.grow(1, RECORD_ALIGN)
        index.add(NS, block, parent, spot, tenant=TenantId("t"), codec=BlockCodec.RAW, now=0.0)
        parent = block if number % 100 else BlockHash(b"")
    assert index.index_bytes / count < 100
    assert index.tenant_bytes(TenantId("t")) == count * RECORD_ALIGN
