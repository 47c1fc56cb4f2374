"""Semantic functions: a Python signature over a prompt template; calling one returns a future at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from covey.client.program import current_program
from covey.client.variable import Variable
from covey.errors import InvalidArgument
from covey.policy import template
from covey.types.ids import CallId
from covey.types.program import CacheMode, CallParams, Message, SemanticCall


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticFunction:
    """What `@covey.semantic` makes of a function. Call it inside `async with client.program():`."""

    name: str
    signature: inspect.Signature
    messages: tuple[Message, ...]
    model: str
    params: CallParams
    cache: CacheMode
    timeout_s: float

    def __call__(self, *args: Any, **kwargs: Any) -> Variable:
        """Add the call to the current program; arguments are texts or variables, other values are written as text.

        Raises:
            InvalidArgument: outside a program, arguments that do not fit, or a variable of another program.
        """
        program = current_program()
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArgument(f"{self.name}: {error}", field=self.name) from error
        bound.apply_defaults()
        names: dict[str, str] = {}
        for key, value in bound.arguments.items():
            variable = value if isinstance(value, Variable) else program.value(str(value))
            if not variable.belongs_to(program):
                raise InvalidArgument(f"{self.name}: {key!r} is a variable of another program", field=key)
            names[key] = variable.name

        def make(call_id: CallId, output: str) -> SemanticCall:
            messages = tuple(
                replace(message, content=template.rename(message.content, names.__getitem__))
                for message in self.messages
            )
            return SemanticCall(
                call_id=call_id,
                messages=messages,
                output=output,
                model=self.model,
                params=self.params,
                cache=self.cache,
                timeout_s=self.timeout_s,
            )

        return program.add(make, stem=self.name)

    def using(self, *, model: str | None = None, **params: Any) -> SemanticFunction:
        """Return the same function with another model or other sampling parameters."""
        chosen = self.model if model is None else model
        return replace(self, model=chosen, params=replace(self.params, **params))


def semantic(
    *,
    model: str = "",
    system: str = "",
    cache: CacheMode = CacheMode.USE,
    timeout_s: float = 0.0,
    **params: Any,
) -> Callable[[Callable[..., Any]], SemanticFunction]:
    """Declare a semantic function: its docstring is the prompt, `{{name}}` stands for the parameter `name`.

    `params` are those of `covey.types.program.CallParams`: `max_tokens`, `temperature`, `seed`, `stop` and so on.

    Raises:
        InvalidArgument: no docstring, a placeholder that is no parameter, a parameter that nothing names, or an
            unknown sampling parameter.
    """
    try:
        sampling = CallParams(**params)
    except TypeError as error:
        raise InvalidArgument(f"semantic: {error}", field=next(iter(params))) from error

    def declare(function: Callable[..., Any]) -> SemanticFunction:
        name = getattr(function, "__name__", "call")
        prompt = inspect.getdoc(function) or ""
        if not prompt:
            raise InvalidArgument(f"{name}: the docstring is the prompt, and there is none", field=name)
        signature = inspect.signature(function)
        _check_names(name, prompt + system, signature)
        messages = [Message(role="system", content=system)] if system else []
        messages.append(Message(role="user", content=prompt))
        return SemanticFunction(
            name=name,
            signature=signature,
            messages=tuple(messages),
            model=model,
            params=sampling,
            cache=cache,
            timeout_s=timeout_s,
        )

    return declare


def _check_names(name: str, text: str, signature: inspect.Signature) -> None:
    parameters = set(signature.parameters)
    for placeholder in template.names(text):
        if placeholder not in parameters:
            raise InvalidArgument(f"{name}: {{{{{placeholder}}}}} is no parameter of the function", field=placeholder)
    unused = parameters - set(template.names(text))
    if unused:
        raise InvalidArgument(f"{name}: the prompt does not name {{{{{min(unused)}}}}}", field=min(unused))
