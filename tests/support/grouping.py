"""Which tests of a parallel run stay together, and which start first: the longest, or one core would wait for it."""

from __future__ import annotations

import pytest
from _pytest.nodeid import NodeId

FIRST = (
    "tests/e2e/test_golden.py",
    "tests/faults/test_worker_loss.py",
    "tests/faults/test_launcher.py",
    "tests/unit/model/gpu/test_contract.py",
    "tests/unit/policy/test_batch_policies.py",
    "tests/unit/engine/test_golden_paths.py",
    "tests/unit/model/test_golden.py",
    "tests/unit/model/gpu/test_runner.py",
    "tests/unit/model/gpu/test_device.py",
    "tests/unit/engine/test_golden_packaged.py",
    "tests/unit/engine/test_crowd.py",
)
SHARED = {"module", "package"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `--dist loadgroup`, tests of a file that share a fixture form a group, and long files come first."""
    if not config.getoption("loadgroup", default=False):
        return
    items.sort(key=lambda item: FIRST.index(_file(item)) if _file(item) in FIRST else len(FIRST))
    for item in items:
        group = _group(item)
        if group is not None:
            # xdist 3.8 reads groups off the id, but writes them to an attribute that pytest 9.2 no longer looks at.
            item._id = NodeId.parse(f"{item.nodeid}@{group}")


def _group(item: pytest.Item) -> str | None:
    """What the test asks for by its mark, or its file if it uses a fixture that outlives it; a session's are cheap."""
    mark = item.get_closest_marker("xdist_group")
    if mark is not None:
        return str(mark.args[0])
    manager = item.session._fixturemanager
    found = (manager.getfixturedefs(name, item) or () for name in getattr(item, "fixturenames", ()))
    shares = any(fixture.scope in SHARED for fixtures in found for fixture in fixtures)
    return _file(item) if shares else None


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]
