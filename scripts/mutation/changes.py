"""Small changes of a source, each of which its tests should notice.

Only what decides is changed: no annotation, no import, nothing in a message (`raise`, f-strings,
text with spaces), nothing that only type checkers or readers see.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_CALLED = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
"""Functions, and what stands in their place."""

_SHOWN = ("progress", "tick", "say", "log", "cast", "TypeVar", "NewType")
"""Functions of which the arguments are for people or type checkers."""


@dataclass(frozen=True)
class Change:
    """One change of a source.

    Attributes:
        kind: What is changed, in a word or two.
        start: First byte of the source that is replaced.
        end: The byte behind the last.
        new: What stands there instead.
        line: Where that is.
        before: What stood there.
    """

    kind: str
    start: int
    end: int
    new: str
    line: int
    before: str

    def apply(self, source: bytes) -> bytes:
        """The changed source."""
        return source[: self.start] + self.new.encode() + source[self.end :]

    @property
    def words(self) -> str:
        """What is changed into what, in one line."""
        before, new = (" ".join(text.split()) for text in (self.before, self.new))
        return f"line {self.line}, {self.kind}: {_short(before)} -> {_short(new)}"


def _short(text: str) -> str:
    return text if len(text) <= 90 else f"{text[:43]} … {text[-43:]}"


def changes_of(source: bytes) -> list[Change]:
    """All changes of a source, in the order of their places."""
    places = _Places(source)
    found = [
        places.change(kind, node, new)
        for node in _deciding(ast.parse(source))
        for kind, new in _variants(node)
    ]
    return sorted(found, key=lambda change: (change.start, change.end, change.new))


class _Places:
    """Finds where the nodes of a source stand in its bytes."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def change(self, kind: str, node: ast.expr | ast.stmt, new: str) -> Change:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self.lines[node.lineno - 1] + node.col_offset
        end = self.lines[node.end_lineno - 1] + node.end_col_offset
        return Change(kind, start, end, new, node.lineno, self.source[start:end].decode())


def _deciding(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Expressions and statements that decide something."""
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    for inner in _inner(node):
        yield from _deciding(inner)


def _inner(node: ast.AST) -> Iterator[ast.AST]:
    """What of a node is looked into."""
    skipped: list[ast.AST | None] = []
    match node:
        case ast.JoinedStr() | ast.Raise() | ast.Assert() | ast.Import() | ast.ImportFrom():
            return
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.Call() if _is_shown(node):
            return
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            skipped = [*node.decorator_list, node.returns, *_docstring(node)]
        case ast.ClassDef():
            skipped = [*node.decorator_list, *node.bases, *_docstring(node)]
        case ast.Module():
            skipped = [*_docstring(node)]
        case ast.AnnAssign():
            skipped = [node.annotation]
        case ast.arg():
            return
        case ast.Assign(targets=[ast.Name()], value=ast.Subscript()) if _is_alias(node):
            return
    yield from (inner for inner in ast.iter_child_nodes(node) if inner not in skipped)


def _is_shown(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in _SHOWN or name.endswith("Error") or name == "about"


def _is_alias(node: ast.Assign) -> bool:
    """Whether it names a type, such as `Stamp = tuple[int, int]`: so does the name's capital."""
    name = node.targets[0]
    return isinstance(name, ast.Name) and name.id[0].isupper() and not name.id.isupper()


def _docstring(node: ast.AST) -> Iterator[ast.stmt]:
    """Texts that stand alone: of a module, class, function or constant."""
    for statement in getattr(node, "body", []):
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            yield statement


def _variants(node: ast.expr | ast.stmt) -> Iterator[tuple[str, str]]:
    """Kinds of change of a node, and what stands in its place."""
    made: Iterator[tuple[str, str | ast.expr]]
    for function in _MAKERS.get(type(node), ()):
        made = function(node)
        for kind, new in made:
            yield kind, new if isinstance(new, str) else f"({ast.unparse(new)})"


def _with(node: ast.expr, **fields: object) -> ast.expr:
    """A copy of a node with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


Made = Iterator[tuple[str, str | ast.expr]]


def _without_each(node: ast.expr, field: str, fewest: int = 1) -> Iterator[ast.expr]:
    """A node without one of the entries of a field, for each of these."""
    entries = getattr(node, field)
    if len(entries) < fewest:
        return
    for place in range(len(entries)):
        yield _with(node, **{field: [*entries[:place], *entries[place + 1 :]]})


def _compare(node: ast.Compare) -> Made:
    for place, operator in enumerate(node.ops):
        ops = [*node.ops[:place], _COMPARED[type(operator)](), *node.ops[place + 1 :]]
        yield "comparison", _with(node, ops=ops)


def _compute(node: ast.BinOp) -> Made:
    # A path's slash and parts of a text are no numbers: a change there ends in an error at once.
    texts = any(
        isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str)
        for side in (node.left, node.right)
    )
    if type(node.op) in _COMPUTED and not texts:
        yield "operator", _with(node, op=_COMPUTED[type(node.op)]())


def _combine(node: ast.BoolOp) -> Made:
    other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
    yield "and/or", _with(node, op=other)
    yield "and/or", node.values[0]
    yield "and/or", node.values[-1]


def _negate(node: ast.UnaryOp) -> Made:
    if isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield "negation", node.operand


def _constant(node: ast.Constant) -> Made:
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield "constant", ast.Constant(value + 1)
    elif isinstance(value, float):
        yield "constant", ast.Constant(value * 2 or 1.0)
    elif isinstance(value, str) and " " not in value:
        yield "text", ast.Constant(f"XX{value}")
    elif isinstance(value, bytes):
        yield "text", ast.Constant(b"XX" + value)


def _call(node: ast.Call) -> Made:
    if _is_shown(node):
        return
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in _CALLED:
        yield "function", _with(node, func=ast.Name(_CALLED[name]))
    for less in _without_each(node, "keywords"):
        yield "argument left out", less


def _dict(node: ast.Dict) -> Made:
    for place in range(len(node.keys)):
        keys = [*node.keys[:place], *node.keys[place + 1 :]]
        values = [*node.values[:place], *node.values[place + 1 :]]
        yield "entry left out", _with(node, keys=keys, values=values)


def _list(node: ast.List | ast.Set) -> Made:
    if isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
        for less in _without_each(node, "elts", fewest=2):
            yield "entry left out", less


def _tuple(node: ast.Tuple) -> Made:
    plain = all(isinstance(each, ast.Constant | ast.Starred) for each in node.elts)
    if plain and isinstance(node.ctx, ast.Load):
        for less in _without_each(node, "elts", fewest=2):
            yield "entry left out", less


def _either(node: ast.IfExp) -> Made:
    yield "condition", node.body
    yield "condition", node.orelse


def _comprehension(node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> Made:
    for place, loop in enumerate(node.generators):
        if loop.ifs:
            every = ast.comprehension(loop.target, loop.iter, [], loop.is_async)
            generators = [*node.generators[:place], every, *node.generators[place + 1 :]]
            yield "condition left out", _with(node, generators=generators)


def _slice(node: ast.Subscript) -> Made:
    part = node.slice
    if isinstance(part, ast.Slice):
        for end in ("lower", "upper", "step"):
            if getattr(part, end) is not None:
                less = ast.Slice(part.lower, part.upper, part.step)
                setattr(less, end, None)
                yield "end of a slice left out", _with(node, slice=less)


def _statement(node: ast.stmt) -> Made:
    if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _is_shown(node.value):
        return
    yield "statement left out", "pass"


def _return(node: ast.Return) -> Made:
    if isinstance(node.value, ast.Constant | None):
        yield "statement left out", "pass"


_MAKERS: dict[type[ast.AST], tuple[Callable[..., Made], ...]] = {
    ast.Compare: (_compare,),
    ast.BinOp: (_compute,),
    ast.BoolOp: (_combine,),
    ast.UnaryOp: (_negate,),
    ast.Constant: (_constant,),
    ast.Call: (_call,),
    ast.Dict: (_dict,),
    ast.List: (_list,),
    ast.Set: (_list,),
    ast.Tuple: (_tuple,),
    ast.IfExp: (_either,),
    ast.ListComp: (_comprehension,),
    ast.SetComp: (_comprehension,),
    ast.GeneratorExp: (_comprehension,),
    ast.DictComp: (_comprehension,),
    ast.Subscript: (_slice,),
    ast.Expr: (_statement,),
    ast.AugAssign: (_statement,),
    ast.Raise: (_statement,),
    ast.Continue: (_statement,),
    ast.Break: (_statement,),
    ast.Return: (_return,),
}
