"""What the demo runs: map over modules of the standard library, read each with pydoc, reduce to one answer."""

from __future__ import annotations

import io
import pydoc

from covey.client.tool import tool
from covey.client.workflow import Ref, Refs, Workflow

MODULES = ("bisect", "heapq", "fnmatch")
DOCUMENT_CHARS = 1200
SYSTEM = "You are a careful technical writer. You answer briefly and only from what you are given."
ASKING_TOKENS = 32
NOTE_TOKENS = 48
ANSWER_TOKENS = 64


@tool
def read_documentation(module: str) -> str:
    """Return the beginning of a standard module's documentation, as `pydoc` prints it."""
    page = io.StringIO()
    pydoc.Helper(output=page).help(module)
    return pydoc.plain(page.getvalue())[:DOCUMENT_CHARS]


def reading(modules: tuple[str, ...] = MODULES) -> Workflow:
    """For each module: the model says what to look for, a tool reads the documentation, the model takes a note.

    The note continues the conversation that asked, so its prompt begins with what the worker has already computed:
    those blocks stay pinned while the tool runs.
    """
    workflow = Workflow("read-the-library")

    def branch(_branch_id: str, module: str) -> Ref:
        ask = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"What would you look up first to explain Python's module {module}?"},
        ]
        asked = workflow.llm(f"ask_{module}", ask, max_tokens=ASKING_TOKENS, temperature=0.0)
        read = workflow.tool(
            f"read_{module}", "read_documentation", module=module, after=(asked,), expected_s=2.0, timeout_s=60.0
        )
        noting = [
            *ask,
            {"role": "assistant", "content": str(asked)},
            {
                "role": "user",
                "content": f"Here is its documentation:\n{read}\nIn two sentences: what is it for?",
            },
        ]
        return workflow.llm(f"note_{module}", noting, max_tokens=NOTE_TOKENS, temperature=0.0)

    notes: Refs = workflow.map("branch", modules, branch)
    answer = workflow.llm(
        "answer",
        f"Notes on some modules:\n{notes}\nWhich of them would you use to keep a list sorted, and why?",
        system=SYSTEM,
        max_tokens=ANSWER_TOKENS,
        temperature=0.0,
    )
    workflow.output(answer)
    return workflow
