"""The in-process engine: an actor that owns a runner and its blocks. Prefill and decode differ in policy, not in code.

`Engine` is what services hold; `EngineActor` is behind it; `fake.FakeRunner` stands for a model in tests.
"""

from __future__ import annotations
