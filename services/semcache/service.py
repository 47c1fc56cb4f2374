"""The semcache service: ready on its exact tier at once, on its semantic one when the encoder has loaded.

Entries live in memory: a restart begins with an empty cache.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import anyio
from structlog.typing import FilteringBoundLogger

from covey.actor import Restart, supervise
from covey.policy.reuse import ReusePolicy
from covey.runtime import Runtime
from covey.types.generate import Role

from .cache import AnswerCache, CacheLimits
from .config import Config
from .encoder import Embedder, Encode, Encoder, EncoderStatus
from .learning import learn_categories
from .metrics import CacheMetrics
from .minilm import PACKAGED, SentenceModel, find_model, verify
from .servicer import SemCacheServicer
from .store import Store
from .upkeep import Upkeep


async def serve(config: Config, rt: Runtime) -> None:
    """Serve until stopped; raises what `find_model` raises, at once, when the encoder is not there."""
    folder = find_model(config.encoder)
    model = PACKAGED if config.encoder == PACKAGED else folder.name
    metrics = CacheMetrics(rt.metrics)
    status = EncoderStatus()
    store = Store(
        entries_max=config.entries_max,
        size_bytes_max=config.size_bytes_max,
        tail_max=config.exact_search_max,
    )
    async with rt.bus() as bus, supervise(grace_s=config.drain_s, on_crash=partial(log_crash, rt.log)) as supervisor:
        encoder = supervisor.start(
            lambda: Encoder(
                partial(load_model, config, folder), status, batch_max=config.encode_batch, clock=rt.clock, log=rt.log
            ),
            name="encoder",
            capacity=config.encoder_queue,
            restart=Restart(),
        )
        if config.preload:
            encoder.offer(Encode(texts=()))
        embedder = Embedder(encoder, status, memo_max=config.memo_max)
        cache = AnswerCache(
            store,
            ReusePolicy(config.policies()),
            embedder,
            classifies=bool(config.examples()),
            limits=CacheLimits(
                neighbours=config.neighbours,
                encode_s=config.encode_s,
                entry_size_bytes_max=config.entry_size_bytes_max,
            ),
            metrics=metrics,
            clock=rt.clock,
            rng=rt.rng,
        )
        servicer = SemCacheServicer(
            cache,
            embedder,
            model=model,
            embed_batch=config.encode_batch,
            embed_wait_s=config.embed_wait_s,
        )
        upkeep = Upkeep(store, embedder, metrics, rt.clock, every_s=config.sweep_s)
        learn = partial(learn_categories, config.examples(), embedder, cache, floor=config.classify_floor, log=rt.log)
        async with anyio.create_task_group() as tg:
            tg.start_soon(upkeep.run)
            tg.start_soon(learn)
            async with (
                rt.serve_rpc(config.listen, servicer.handlers(), config.drain_s) as server,
                rt.announce(bus, Role.SEMCACHE, server.address, labels={"embedding_model": model}),
            ):
                await rt.ready()
                await rt.until_stopped()
            tg.cancel_scope.cancel()


def log_crash(log: FilteringBoundLogger, name: str, error: Exception, restarting: bool) -> None:
    """Log that an actor failed: the kind of error only, its message might quote a text."""
    log.error("actor crashed", actor=name, error=type(error).__name__, restarting=restarting)


def load_model(config: Config, folder: Path) -> SentenceModel:
    """Check and load the encoder; takes seconds, for a thread. Raises what `verify` and `SentenceModel` raise."""
    if config.encoder == PACKAGED:
        verify(folder)
    return SentenceModel(folder, threads=config.encoder_threads, batch_max=config.encode_batch)
