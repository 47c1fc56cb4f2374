"""What a worker process makes of its settings: a loaded model and an engine that answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from covey.clock import MonotonicClock
from covey.engine.config import EngineConfig
from covey.engine.worker import gauges, load_model, open_worker
from covey.errors import InvalidArgument, Unavailable
from covey.types.generate import Finished, Role
from covey.types.ids import WorkerId
from tests.support.engines import Shelf, collect, plain, request_of
from tests.support.tiny_llama import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16"},
        {"precision": "int8", "kv_dtype": "int8"},
        {"batching": "layered", "admission": "past_future", "speculation": "off"},
        {"batching": "flow"},
        {"batching": "laps", "max_batch_tokens": 128},
    ],
)
async def test_settings_reach_the_engine(settings: dict[str, str], model: Path, tmp_path: Path) -> None:
    base = {"model": str(model), "cache_dir": str(model.parent / "cache"), "kv_blocks": 32, "block_size": 8}
    config = EngineConfig(**(base | settings))  # type: ignore[arg-type]
    opened = open_worker(
        config, role=Role.DECODE, worker=WorkerId("w"), clock=MonotonicClock(), run_dir=tmp_path, store=Shelf()
    )
    async with opened as engine:
        info = engine.info()
        kept_in = {"fp32": "fp32", "bf16": "fp16"}.get(config.precision, "int8")
        assert (info.precision, info.kv_dtype) == (config.precision, kept_in)
        assert info.capacity_blocks == 32
        answer = await collect(engine, plain(request_of(range(1, 100), max_tokens=40), model=""))
        assert isinstance(answer.last, Finished), answer.last
        assert len(answer.ids) == 40
        assert gauges(engine)["computed_tokens",] >= 138
        if config.speculation == "off":
            assert engine.board.drafted_tokens == 0


async def test_what_cannot_be_loaded_says_what_to_do(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="nowhere"):
        await load_model(EngineConfig(model="nowhere"), run_dir=tmp_path, clock=MonotonicClock())
    with pytest.raises(InvalidArgument, match="less than one block"):
        await load_model(EngineConfig(model=str(model), kv_bytes=100), run_dir=tmp_path, clock=MonotonicClock())


async def test_a_gpu_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    config = EngineConfig(model=str(model), cache_dir=str(tmp_path / "cache"), kv_blocks=4, device="cuda")
    with pytest.raises(InvalidArgument, match="sees no NVIDIA GPU") as refused:
        await load_model(config, run_dir=tmp_path, clock=MonotonicClock())
    assert refused.value.field == "engine.device"
    assert not (tmp_path / "cache").exists(), "no weights were converted for nothing"
