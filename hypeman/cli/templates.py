"""The templates of Docker's ``--format``: the useful part of Go's text/template. Pure.

    {{.Names}}  {{.State.Status}}  {{json .}}  table {{.ID}}\\t{{.Image}}  {{.Label "team"}}
    {{range .Mounts}}…{{else}}…{{end}}  {{range $key, $value := .NetworkSettings.Ports}}…{{end}}
    {{if eq .State.Status "running"}}…{{else}}…{{end}}  {{(index .Mounts 0).Name | upper}}

Everything else is refused by name. What the fields are is in ``docker_fields.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

NO_VALUE = "<no value>"
_TABLE = "table"
_PADDING = 3
"""Spaces between the columns of a table."""
_ESCAPES = {r"\t": "\t", r"\n": "\n"}
_ACTION = re.compile(
    r"\{\{(?P<left>-\s)?\s*(?P<text>/\*.*?\*/|(?:\"(?:\\.|[^\"\\])*\"|`[^`]*`|[^\"`])*?)\s*(?P<right>\s-)?\}\}", re.S
)
_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<string>"(?:\\.|[^"\\])*"|`[^`]*`)|(?P<number>-?\d+)|(?P<variable>\$\w*)|(?P<field>\.\w*)"""
    r"""|(?P<word>[A-Za-z]\w*)|(?P<sign>:=|[|(),])"""
)
_OTHERS = frozenset(["block", "break", "continue", "define", "template", "with"])


class TemplateError(Exception):
    """What is wrong with a template, or with a value that it names."""


class Fields(dict[str, Any]):
    """An object of Docker: a name that it lacks is an error. A value may be a Lazy or a Method."""


class Lazy(msgspec.Struct, frozen=True):
    """A value that costs a request, and is asked for when a template names it."""

    get: Callable[[], Any]


class Method(msgspec.Struct, frozen=True):
    """A field that takes arguments, as in ``.Label "team"``. It is no part of ``json .``."""

    call: Callable[..., Any]


class _Headers(Fields):
    """In place of an object: each field is the header of its column."""

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self._names = names

    def __missing__(self, name: str) -> Any:
        header = self._names.get(name) or re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).upper()
        return Method(lambda *words: str(words[0]) if words else header)


_Scope = dict[str, Any]
_Evaluate = Callable[[Any, _Scope], Any]
_Write = Callable[[Any, _Scope], str]


class Template:
    """A compiled template. Raises TemplateError for what it is not."""

    def __init__(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        self.is_table = word == _TABLE
        if self.is_table:
            text = rest.strip()
        for escape, character in _ESCAPES.items():
            text = text.replace(escape, character)
        self._write = _Parser(text).template()

    def render(self, value: Any) -> str:
        """Raises TemplateError for a field that ``value`` lacks."""
        return self._write(value, {"$": value})

    def lines(self, values: Sequence[Any], headers: Mapping[str, str]) -> str:
        """A line for each value, or a table of them; ``headers`` of fields whose names do not say it. Raises
        TemplateError."""
        rows = [self.render(value) for value in values]
        if self.is_table:
            rows = _aligned([self.render(_Headers(headers)), *rows])
        return "\n".join(rows)


def _aligned(rows: Sequence[str]) -> list[str]:
    """Rows whose cells end in tabs, as columns."""
    cells = [row.split("\t") for row in rows]
    count = max(map(len, cells))
    widths = [max((len(row[at]) for row in cells if at < len(row) - 1), default=0) for at in range(count)]
    return ["".join(
        cell.ljust(widths[at] + _PADDING) if at < len(row) - 1 else cell for at, cell in enumerate(row)
    ).rstrip() for row in cells]  # fmt: skip


class _Parser:
    """Turns text into functions of a value and the variables."""

    def __init__(self, text: str) -> None:
        self._parts: list[str | _Action] = []
        at = 0
        trimmed = False
        for found in _ACTION.finditer(text):
            before = text[at : found.start()]
            if trimmed:
                before = before.lstrip()
            self._add_text(before.rstrip() if found["left"] else before)
            if not found["text"].startswith("/*"):
                self._parts.append(_Action(found["text"]))
            at, trimmed = found.end(), bool(found["right"])
        rest = text[at:]
        if "{{" in rest:
            raise TemplateError("{{ without }}")
        self._add_text(rest.lstrip() if trimmed else rest)
        self._at = 0

    def _add_text(self, text: str) -> None:
        if text:
            self._parts.append(text)

    def template(self) -> _Write:
        write, ended_by = self._list()
        if ended_by:
            raise TemplateError(f"{{{{{ended_by}}}}} without if or range")
        return write

    def _list(self) -> tuple[_Write, str]:
        """What stands before ``else``, ``end`` or the end, and which of them it was."""
        writes: list[_Write] = []
        ended_by = ""
        while self._at < len(self._parts) and not ended_by:
            part = self._parts[self._at]
            self._at += 1
            if isinstance(part, str):
                writes.append(_constant(part))
            elif part.word in ("end", "else"):
                ended_by = part.word
                if part.text != part.word:
                    raise TemplateError(f"{{{{{part.text}}}}} is not supported")
            else:
                writes.append(self._action(part))
        return lambda value, scope: "".join(write(value, scope) for write in writes), ended_by

    def _action(self, action: _Action) -> _Write:
        if action.word == "if":
            action.take()
            return self._if(action.pipeline())
        if action.word == "range":
            action.take()
            return self._range(action.variables(), action.pipeline())
        if action.word in _OTHERS:
            raise TemplateError(f"{action.word} is not supported; there are if, range, else and end")
        evaluate = action.pipeline()
        return lambda value, scope: _text(evaluate(value, scope))

    def _branches(self) -> tuple[_Write, _Write]:
        first, ended_by = self._list()
        second: _Write = lambda _value, _scope: ""  # noqa: E731
        if ended_by == "else":
            second, ended_by = self._list()
        if ended_by != "end":
            raise TemplateError("{{end}} is missing")
        return first, second

    def _if(self, condition: _Evaluate) -> _Write:
        then, otherwise = self._branches()
        return lambda value, scope: (then if _is_true(condition(value, scope)) else otherwise)(value, scope)

    def _range(self, names: Sequence[str], over: _Evaluate) -> _Write:
        each, otherwise = self._branches()

        def write(value: Any, scope: _Scope) -> str:
            pairs = _pairs(over(value, scope))
            if not pairs:
                return otherwise(value, scope)
            texts = []
            for key, element in pairs:
                bound = dict(zip(names, (key, element) if len(names) > 1 else (element,), strict=False))
                texts.append(each(element, {**scope, **bound}))
            return "".join(texts)

        return write


class _Action:
    """The words of one ``{{…}}``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise TemplateError(f"{text[at:]!r} in {{{{{text}}}}} is not understood")
            self._tokens.append((str(found.lastgroup), found.group()))
            at = found.end()
        self._at = 0
        self._skip_space()
        kind, word = self._peek()
        if kind == "end":
            raise TemplateError("{{}} is empty")
        self.word = word if kind == "word" else ""

    def _skip_space(self) -> bool:
        begin = self._at
        while self._at < len(self._tokens) and self._tokens[self._at][0] == "space":
            self._at += 1
        return self._at > begin

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self._peek()
        self._at += 1
        self._skip_space()
        return token

    def variables(self) -> list[str]:
        """Of ``$key, $value :=``."""
        if ("sign", ":=") not in self._tokens:
            return []
        names = []
        while True:
            kind, name = self.take()
            if kind != "variable":
                raise TemplateError(f"{name!r} in {{{{{self.text}}}}} is no variable")
            names.append(name)
            _, sign = self.take()
            if sign == ":=":
                return names
            if sign != ",":
                raise TemplateError(f"{sign!r} in {{{{{self.text}}}}} is not understood")

    def pipeline(self, closed_by: str = "") -> _Evaluate:
        evaluate = self._command(None)
        while self._peek() == ("sign", "|"):
            self.take()
            evaluate = self._command(evaluate)
        if self._peek()[1] != closed_by:
            raise TemplateError(f"{self._peek()[1] or closed_by!r} in {{{{{self.text}}}}} is not understood")
        return evaluate

    def _command(self, last: _Evaluate | None) -> _Evaluate:
        """A function or a field with its arguments; ``last`` is what a pipe hands over."""
        kind, word = self._peek()
        function = FUNCTIONS.get(word) if kind == "word" else None
        if kind == "word" and function is None and word not in _LITERALS:
            raise TemplateError(f"there is no function {word}; there are {', '.join(FUNCTIONS)}")
        if function is not None:
            self._at += 1
            self._skip_space()
        first = None if function is not None else self._operand()
        arguments = []
        while self._peek()[0] != "end" and self._peek()[1] not in ("|", ")"):
            arguments.append(self._operand())
        if last is not None:
            arguments.append(last)

        def evaluate(value: Any, scope: _Scope) -> Any:
            given = [_value(argument(value, scope)) for argument in arguments]
            if first is None:
                assert function is not None
                return _called(word, function, given)
            found = first(value, scope)
            if isinstance(found, Method):
                return _called(word, found.call, given)
            if given:
                raise TemplateError(f"{word} takes no arguments")
            return found

        return evaluate

    def _operand(self) -> _Evaluate:
        kind, word = self._peek()
        self._at += 1
        evaluate: _Evaluate
        if kind == "string":
            try:
                text = word[1:-1] if word[0] == "`" else msgspec.json.decode(word, type=str)
            except msgspec.DecodeError:
                raise TemplateError(f"{word} is no text") from None
            evaluate = lambda _value, _scope: text  # noqa: E731
        elif kind == "number":
            evaluate = lambda _value, _scope: int(word)  # noqa: E731
        elif kind == "variable":
            evaluate = lambda _value, scope: _variable(scope, word)  # noqa: E731
        elif kind == "field":
            evaluate = lambda value, _scope: field(value, word[1:]) if word[1:] else value  # noqa: E731
        elif kind == "word" and word in _LITERALS:
            evaluate = lambda _value, _scope: _LITERALS[word]  # noqa: E731
        elif word == "(":
            self._skip_space()
            evaluate = self.pipeline(closed_by=")")
            self._at += 1
        else:
            raise TemplateError(f"{word or 'the end'!r} in {{{{{self.text}}}}} is not understood")
        while self._peek()[0] == "field" and self._peek()[1] != ".":
            evaluate = _below(evaluate, self._peek()[1][1:])
            self._at += 1
        self._skip_space()
        return evaluate


def _constant(text: str) -> _Write:
    return lambda _value, _scope: text


def _below(evaluate: _Evaluate, name: str) -> _Evaluate:
    return lambda value, scope: field(evaluate(value, scope), name)


def _variable(scope: _Scope, name: str) -> Any:
    if name not in scope:
        raise TemplateError(f"there is no variable {name}")
    return scope[name]


def field(value: Any, name: str) -> Any:
    """The field of an object or the entry of a map. Raises TemplateError."""
    value = _value(value)
    if isinstance(value, Fields):
        try:
            found = value[name]
        except KeyError:
            raise TemplateError(
                f"there is no field .{name}; there are {', '.join(f'.{key}' for key in value)}"
            ) from None
        return found if isinstance(found, Method) else _value(found)
    if isinstance(value, dict):
        return value.get(name, NO_VALUE)
    raise TemplateError(f"{_text(value)!r} has no field .{name}")


def _value(value: Any) -> Any:
    if isinstance(value, Lazy):
        return value.get()
    if isinstance(value, Method):
        return value.call()
    return value


def _called(name: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    try:
        return function(*arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise TemplateError(f"{name}: {error}") from None


def _is_true(value: Any) -> bool:
    value = _value(value)
    return bool(value) and value != NO_VALUE


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    value = _value(value)
    if value is None or value == NO_VALUE:
        return []
    if isinstance(value, dict):
        return [(key, _value(value[key])) for key in sorted(value) if not isinstance(value[key], Method)]
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    raise TemplateError(f"range is over a list or a map, not {_text(value)!r}")


def _text(value: Any) -> str:
    """As Go prints it."""
    value = _value(value)
    if value is None:
        return NO_VALUE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"map[{' '.join(f'{key}:{_text(inner)}' for key, inner in sorted(_plain(value).items()))}]"
    if isinstance(value, list | tuple):
        return f"[{' '.join(map(_text, value))}]"
    return str(value)


def _plain(value: Any) -> Any:
    """Without what only templates can use."""
    value = _value(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if not isinstance(inner, Method)}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _json(value: Any) -> str:
    return msgspec.json.encode(_plain(value)).decode()


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, Fields):
            value = field(value, str(key))
        elif isinstance(value, dict):
            value = value.get(str(key), "")
        elif isinstance(value, list | tuple) and isinstance(key, int):
            if not 0 <= key < len(value):
                raise TemplateError(f"index: there is no element {key} of {len(value)}")
            value = value[key]
        else:
            raise TemplateError(f"index: {_text(value)!r} has no element {key!r}")
    return value


def _join(values: Sequence[Any], separator: str) -> str:
    return separator.join(map(_text, values))


def _equal(first: Any, *others: Any) -> bool:
    return any(_text(first) == _text(other) for other in others)


def _first(values: Sequence[Any], *, false: bool) -> Any:
    """The first that is false, or true; else the last."""
    if not values:
        raise ValueError("arguments are missing")
    return next((value for value in values if _is_true(value) is not false), values[-1])


_LITERALS: Mapping[str, Any] = {"true": True, "false": False, "nil": None}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "json": _json,
    "join": _join,
    "split": lambda text, separator: _text(text).split(separator),
    "upper": lambda text: _text(text).upper(),
    "lower": lambda text: _text(text).lower(),
    "index": _index,
    "len": len,
    "print": lambda *values: "".join(map(_text, values)),
    "println": lambda *values: " ".join(map(_text, values)) + "\n",
    "eq": _equal,
    "ne": lambda first, second: not _equal(first, second),
    "not": lambda value: not _is_true(value),
    "and": lambda *values: _first(values, false=True),
    "or": lambda *values: _first(values, false=False),
}
