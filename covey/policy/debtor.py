"""Who lends memory to whom: debtor/creditor placement of blocks after Infinite-LLM (arXiv 2401.02669 §5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from covey.types.ids import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A decode worker as its own manager reports it (the paper's rManager)."""

    worker: WorkerId
    running: int
    """Sequences in its batch."""
    waiting: int
    """Sequences that wait for blocks."""
    free_blocks: int
    held_blocks: int
    """Blocks of the running sequences that are here."""
    movable_blocks: int = 0
    """Of those, full blocks of long sequences, which may live elsewhere."""
    waiting_blocks: int = 1
    """What one waiting sequence needs."""
    lent_blocks: int = 0
    """Blocks here that belong to others' sequences."""
    borrowed_blocks: int = 0
    """Blocks elsewhere that belong to sequences here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """Seconds of a decode step: `base_s` for the weights, `row_s` a sequence, `block_s` a block that is attended to,
    `remote_s` more as soon as any of them is elsewhere (a round trip a layer, as far as nothing overlaps it).
    """

    base_s: float
    row_s: float
    block_s: float
    remote_s: float

    def throughput(self, instance: Instance) -> float:
        """Tokens a second of an instance with this batch."""
        blocks = instance.held_blocks + instance.lent_blocks
        step_s = self.base_s + self.row_s * instance.running + self.block_s * blocks
        return instance.running / (step_s + (self.remote_s if instance.borrowed_blocks else 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loan:
    """Move `blocks` of the debtor's sequences to the creditor."""

    debtor: WorkerId
    creditor: WorkerId
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LendingConfig:
    """`reserve_share` of its blocks a creditor keeps for itself; a loan must raise the throughput of both together by
    `gain_min`, in relative terms, and a round proposes at most `loans_max`.
    """

    reserve_share: float = 0.25
    gain_min: float = 0.02
    loans_max: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.reserve_share < 1 or self.gain_min < 0 or self.loans_max < 1:
            raise ValueError("reserve_share must be in 0..1, gain_min at least 0 and loans_max at least 1")


class Lending:
    """The global manager's decisions (gManager): pure, of what the instances report."""

    def __init__(self, config: LendingConfig, model: StepModel) -> None:
        self._config = config
        self._model = model

    def lendable(self, instance: Instance) -> int:
        """Blocks that an instance can give away without going short itself."""
        total = instance.free_blocks + instance.held_blocks + instance.lent_blocks
        needed = instance.waiting * instance.waiting_blocks
        return max(0, instance.free_blocks - needed - int(self._config.reserve_share * total))

    def choose(self, instances: Sequence[Instance]) -> tuple[Loan, ...]:
        """Loans in the order in which they pay, greedily: the debtor with most to gain borrows from who can spare most.

        Nobody lends and borrows at once, so that loans form no chains and no cycles. Nothing is proposed whose gain by
        the larger batch is below its cost in remote attention.
        """
        now = {instance.worker: instance for instance in instances}
        loans: list[Loan] = []
        while len(loans) < self._config.loans_max:
            best: tuple[float, Loan] | None = None
            for loan in self._possible(now):
                gain = self._gain(now, loan)
                if gain > 0 and (best is None or gain > best[0]):
                    best = (gain, loan)
            if best is None:
                break
            loans.append(best[1])
            now = _after(now, best[1])
        return tuple(loans)

    def shards(self, blocks: int, creditors: Sequence[Instance]) -> tuple[tuple[WorkerId, int], ...]:
        """Where `blocks` of one sequence that fits no single worker go; see `place_shards`."""
        return place_shards(blocks, {i.worker: self.lendable(i) for i in creditors if not i.borrowed_blocks})

    def _possible(self, now: dict[WorkerId, Instance]) -> list[Loan]:
        debtors = sorted((i for i in now.values() if i.waiting and i.movable_blocks and not i.lent_blocks), key=_name)
        creditors = sorted((i for i in now.values() if not i.borrowed_blocks and self.lendable(i)), key=_name)
        return [
            Loan(debtor=debtor.worker, creditor=creditor.worker, blocks=blocks)
            for debtor in debtors
            for creditor in creditors
            if debtor is not creditor
            for blocks in (min(debtor.movable_blocks, self.lendable(creditor), _wanted(debtor)),)
            if blocks > 0
        ]

    def _gain(self, now: dict[WorkerId, Instance], loan: Loan) -> float:
        """Tokens a second that both make more, less than `gain_min` counting as none."""
        then = _after(now, loan)
        both = (loan.debtor, loan.creditor)
        before = sum(self._model.throughput(now[worker]) for worker in both)
        after = sum(self._model.throughput(then[worker]) for worker in both)
        return after - before if after - before > self._config.gain_min * before else 0.0


def place_shards(blocks: int, lendable: Mapping[WorkerId, int]) -> tuple[tuple[WorkerId, int], ...]:
    """Where `blocks` of one sequence go: to as few creditors as hold them, those that can lend most first; nowhere when
    they cannot hold them all.
    """
    found, left = [], blocks
    for worker in sorted(lendable, key=lambda each: (-lendable[each], each)):
        taken = min(left, lendable[worker])
        if taken > 0:
            found.append((worker, taken))
            left -= taken
    return tuple(found) if not left else ()


def _wanted(debtor: Instance) -> int:
    """Blocks that let all who wait come in."""
    return max(0, debtor.waiting * debtor.waiting_blocks - debtor.free_blocks)


def _after(now: dict[WorkerId, Instance], loan: Loan) -> dict[WorkerId, Instance]:
    debtor, creditor = now[loan.debtor], now[loan.creditor]
    free = debtor.free_blocks + loan.blocks
    entering = min(debtor.waiting, free // max(1, debtor.waiting_blocks))
    taken = entering * debtor.waiting_blocks
    return now | {
        loan.debtor: replace(
            debtor,
            running=debtor.running + entering,
            waiting=debtor.waiting - entering,
            free_blocks=free - taken,
            held_blocks=debtor.held_blocks - loan.blocks + taken,
            movable_blocks=debtor.movable_blocks - loan.blocks,
            borrowed_blocks=debtor.borrowed_blocks + loan.blocks,
        ),
        loan.creditor: replace(
            creditor,
            free_blocks=creditor.free_blocks - loan.blocks,
            lent_blocks=creditor.lent_blocks + loan.blocks,
        ),
    }


def _name(instance: Instance) -> WorkerId:
    return instance.worker
