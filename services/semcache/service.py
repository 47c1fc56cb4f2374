"""The semcache service: ready on its exact tier at once, on its semantic one when the encoder has loaded.

Every entry of an earlier process of the same worker is there before it says that it is ready.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
from anyio import to_thread
from structlog.typing import FilteringBoundLogger

from covey.actor import Restart, Supervisor, supervise
from covey.errors import Unavailable
from covey.net.bus import Bus
from covey.net.channels import Channel
from covey.net.registry import Registry
from covey.policy.reuse import CategoryPolicy, ReusePolicy
from covey.runtime import Runtime
from covey.types.event import WorkerRecord, WorkerState
from covey.types.generate import Role

from .branch import Branch
from .cache import AnswerCache
from .config import Config
from .desk import Desk
from .encoder import Embedder, Encode, Encoder, EncoderStatus
from .finder import CacheLimits
from .flights import open_flights
from .journal import Journals
from .learning import learn_categories
from .learnt import read_learnt, with_models
from .mesh_judge import MeshJudge
from .metrics import CacheMetrics
from .minilm import PACKAGED, EncoderModel, SentenceModel, find_model, fingerprint, verify
from .onnx_model import OnnxModel, file_fingerprint
from .peers import ENCODER, Peers
from .servicer import SemCacheServicer
from .shadow import Sample, Sampled, Shadow, dropping
from .storage import open_library
from .tutor import Tutor
from .upkeep import Upkeep

SWITCH_S = 0.001
"""How long a thread keeps the interpreter from the event loop: Python's usual 5 ms are twenty look-ups."""


async def serve(config: Config, rt: Runtime) -> None:
    """Serve until stopped; raises what `find_model` raises, at once, when the encoder is not there."""
    sys.setswitchinterval(SWITCH_S)
    folder = find_model(config.encoder)
    model = PACKAGED if config.encoder == PACKAGED else folder.name
    policies = await policies_of(config, model)
    metrics, status = CacheMetrics(rt.metrics), EncoderStatus()
    async with (
        rt.bus() as bus,
        rt.registry(bus) as registry,
        open_library(config, encoder=await encoder_id(config, folder), clock=rt.clock, log=rt.log) as library,
        supervise(grace_s=config.drain_s, on_crash=partial(log_crash, rt.log)) as supervisor,
    ):
        load = partial(load_model, config, folder)
        encoder = supervisor.start(
            lambda: Encoder(load, status, batch_max=config.encode_batch, clock=rt.clock, log=rt.log),
            name="encoder",
            capacity=config.encoder_queue,
            restart=Restart(),
        )
        if config.preload:
            encoder.offer(Encode(texts=()))
        embedder = Embedder(encoder, status, memo_max=config.memo_max)
        sample = open_judge(config, supervisor, registry, rt, lambda hit, right: cache.judged(hit, right=right))
        cache = AnswerCache(
            library,
            ReusePolicy(policies),
            embedder,
            classifies=bool(config.examples()),
            limits=limits_of(config),
            accounts=config.accounts(),
            sample=sample,
            metrics=metrics,
            clock=rt.clock,
            rng=rt.rng,
        )
        desk = Desk(cache, library, embedder, open_flights(config, rt.clock, rt.rng, metrics), metrics, rt.clock)
        branch = open_branch(desk, policies, Peers(lambda: ready_peers(registry), rt.worker), bus, rt)
        tutor = Tutor(embedder, config.tutor(), clock=rt.clock, rng=rt.rng)
        branch.on_invalidated = tutor.forget
        servicer = SemCacheServicer(
            branch, embedder, tutor, model=model, embed_batch=config.encode_batch, embed_wait_s=config.embed_wait_s
        )
        upkeep = Upkeep(library, embedder, metrics, rt.clock, every_s=config.sweep_s)
        learn = partial(learn_categories, config.examples(), embedder, cache, floor=config.classify_floor, log=rt.log)
        labels = {"embedding_model": model, ENCODER: library.encoder}
        async with anyio.create_task_group() as tg:
            tg.start_soon(upkeep.run)
            tg.start_soon(learn)
            tg.start_soon(branch.run)
            tg.start_soon(tutor.run)
            async with (
                rt.serve_rpc(config.listen, servicer.handlers(), config.drain_s) as server,
                rt.announce(bus, Role.SEMCACHE, server.address, labels=labels),
            ):
                await rt.ready()
                await rt.until_stopped()
            tg.cancel_scope.cancel()
        await upkeep.save()


def open_judge(
    config: Config, supervisor: Supervisor, registry: Registry, rt: Runtime, verdict: Callable[[Sampled, bool], None]
) -> Sample | None:
    """What takes hits to the judge, as an actor beside the cache; None where nobody is to judge."""
    if not config.judge_model:
        return None

    def gateway() -> Channel:
        records = [view.record for view in registry.workers(Role.GATEWAY)]
        if not records:
            raise Unavailable("no gateway is in the registry", retry_after_ms=500)
        return rt.channels.to(min(records, key=lambda record: record.worker).address)

    judge = MeshJudge(gateway, config.judge_model, timeout_s=config.judge_s)
    shadow = partial(Shadow, judge, verdict, rt.log)
    return dropping(supervisor.start(shadow, name="judge", capacity=config.judge_queue, restart=Restart()))


def limits_of(config: Config) -> CacheLimits:
    """The bounds of one look-up and one entry."""
    return CacheLimits(
        neighbours=config.neighbours, encode_s=config.encode_s, entry_size_bytes_max=config.entry_size_bytes_max
    )


def open_branch(desk: Desk, policies: tuple[CategoryPolicy, ...], peers: Peers, bus: Bus, rt: Runtime) -> Branch:
    """This process's place among `peers`."""
    return Branch(
        desk,
        Journals(desk.library, rt.clock),
        peers,
        rt.channels,
        bus,
        ttl={policy.name: policy.ttl_s for policy in policies}.get,
        epoch=rt.epoch,
        clock=rt.clock,
        log=rt.log,
    )


def ready_peers(registry: Registry) -> tuple[WorkerRecord, ...]:
    """Every semcache that takes requests."""
    views = registry.workers(Role.SEMCACHE)
    return tuple(view.record for view in views if view.record.state is WorkerState.READY)


async def policies_of(config: Config, encoder: str) -> tuple[CategoryPolicy, ...]:
    """The policies of the categories, with their learnt decisions; raises what `read_learnt` raises."""
    if not config.learnt:
        return config.policies()
    models = await to_thread.run_sync(read_learnt, Path(config.learnt), encoder)
    return with_models(config.policies(), models, config.guarded())


async def encoder_id(config: Config, folder: Path) -> str:
    """What the encoder's vectors are filed under; the packaged one is checked when it is loaded."""
    if config.encoder_onnx:
        return f"{folder.name}+onnx:{await to_thread.run_sync(file_fingerprint, Path(config.encoder_onnx))}"
    if config.encoder == PACKAGED:
        return PACKAGED
    return f"{folder.name}:{await to_thread.run_sync(fingerprint, folder)}"


def log_crash(log: FilteringBoundLogger, name: str, error: Exception, restarting: bool) -> None:
    """Log that an actor failed: the kind of error only, its message might quote a text."""
    log.error("actor crashed", actor=name, error=type(error).__name__, restarting=restarting)


def load_model(config: Config, folder: Path) -> EncoderModel:
    """Check and load the encoder; takes seconds, for a thread. Raises what `verify` and the models raise."""
    if config.encoder_onnx:
        path = Path(config.encoder_onnx)
        return OnnxModel(path, folder, threads=config.encoder_threads, batch_max=config.encode_batch)
    if config.encoder == PACKAGED:
        verify(folder)
    return SentenceModel(folder, threads=config.encoder_threads, batch_max=config.encode_batch)
