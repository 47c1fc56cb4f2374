"""A durable workflow: a branch a module, each with a real tool call (`pydoc`), reduced to one answer.

Run it with `covey run examples/workflow_with_tool.py` while `covey up` runs. Kill agentflow amid it: the run goes on.
"""

from __future__ import annotations

import pydoc

import anyio

import covey

MODULES = ("bisect", "heapq", "graphlib")


@covey.tool
def read_docs(module: str, characters: int = 600) -> str:
    """The beginning of a standard library module's documentation."""
    return pydoc.plain(pydoc.render_doc(module))[:characters]


def workflow() -> covey.Workflow:
    wf = covey.Workflow("what-is-it-for")

    def branch(node_id: str, module: str) -> covey.Ref:
        docs = wf.tool(f"{node_id}_docs", "read_docs", module=module)
        prompt = f"{docs}\n\nIn one sentence: what is the module {module} for?"
        return wf.llm(node_id, prompt, max_tokens=40, temperature=0)

    answers = wf.map("module", MODULES, branch)
    wf.output(wf.llm("choice", f"{answers}\n\nWhich one sorts a {wf.input('thing')}?", max_tokens=40, temperature=0))
    return wf


async def main() -> None:
    async with covey.Client.connect() as client, client.serve_tools([read_docs]):
        run = await client.submit(workflow(), {"thing": "graph"})
        async with run.events() as events:
            async for event in events:
                what = f"{event.node.id}: {event.node.state.value}" if event.node else f"run: {event.run_state.value}"
                print(f"{event.seq:3} {what}")
        print((await run.result())["choice"])


if __name__ == "__main__":
    anyio.run(main)
