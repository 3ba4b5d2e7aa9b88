"""Definitions of this package, with all they need of it, as the text of one Python module that does without it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

import ikem_fast

_PACKAGE = ikem_fast.__name__


class SourceError(ValueError):
    """A definition that cannot stand in a module of its own."""


@dataclass(frozen=True)
class _Import:
    """``import module as name``, or ``from module import original as name``."""

    module: str
    original: str | None
    name: str


@dataclass
class _Module:
    """What a module defines and imports at its top level, by name.

    Attributes:
        definitions: first and last line, from 1, and the syntax tree.
        imports: those that are there at run time.
    """

    lines: list[str]
    definitions: dict[str, tuple[int, int, ast.stmt]] = field(default_factory=dict)
    imports: dict[str, _Import] = field(default_factory=dict)


@cache
def _read(module_name: str) -> _Module:
    path = import_module(module_name).__file__
    if path is None:
        raise SourceError(f"module {module_name} has no source file")
    text = Path(path).read_text(encoding="utf-8")
    module = _Module(text.splitlines())
    body = ast.parse(text).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        module.imports.update({each.name: each for each in _imports(node)})
        for name in _defined_names(node):
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
            # A comment above a definition, and a string below a constant, belong to it.
            while first > 1 and module.lines[first - 2].startswith("#"):
                first -= 1
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            last = after.end_lineno if is_text else node.end_lineno
            module.definitions[name] = (first, last, node)
    return module


def _imports(node: ast.stmt) -> list[_Import]:
    if isinstance(node, ast.Import):
        return [_Import(alias.name, None, alias.asname or alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module != "__future__":
        return [_Import(node.module, alias.name, alias.asname or alias.name) for alias in node.names]
    return []


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _global_names(node: ast.AST, local: frozenset[str] = frozenset()) -> set[str]:
    """Names that a definition uses and does not bind itself."""
    if isinstance(node, ast.Name):
        return set() if node.id in local else {node.id}
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        parts = list(ast.walk(node))
        local = local.union(part.arg for part in parts if isinstance(part, ast.arg))
        local = local.union(part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
    return set().union(*(_global_names(child, local) for child in ast.iter_child_nodes(node)))


def bundle(roots: Mapping[str, object], imports: Iterable[str] = ()) -> str:
    """Imports and definitions of some functions and classes and of all they use, in an order that runs.

    What is defined in this package, or in the module of a root, is written out; the rest is imported. Names of modules
    of the package (``modality_registry.get``) cannot be followed, so what is bundled imports definitions by name.

    Args:
        roots: by the name they get in the text; it may differ from their own only where nothing else in it uses them.
        imports: statements that what is put below needs.

    Raises:
        SourceError: two definitions have the same name, or something cannot be written out.
    """
    bundler = _Bundler({root.__module__ for root in roots.values()})
    for statement in ast.parse("\n".join(imports)).body:
        bundler.imports.update(_imports(statement))
    for name, root in roots.items():
        bundler.add(root.__module__, root.__qualname__, name)
    return bundler.text()


class _Bundler:
    def __init__(self, own: set[str]) -> None:
        self.own = own
        self.imports: set[_Import] = set()
        self.origins: dict[str, tuple[str, str]] = {}
        self.texts: list[str] = []

    def add(self, module_name: str, name: str, new_name: str | None = None) -> None:
        module = _read(module_name)
        if name not in module.definitions:
            imported = module.imports.get(name)
            if imported is None or imported.original is None or not self._is_own(imported.module):
                raise SourceError(f"{module_name}.{name} is no definition at the top level of a module")
            self.add(imported.module, imported.original, new_name)
            return
        new_name = new_name or name
        origin = (module_name, name)
        if new_name in self.origins:
            if self.origins[new_name] != origin:
                raise SourceError(f"{'.'.join(self.origins[new_name])} and {'.'.join(origin)} have the same name")
            return
        self.origins[new_name] = origin
        first, last, node = module.definitions[name]
        for used in sorted(_global_names(node) - {name}):
            self._add_used(module_name, used)
        lines = module.lines[first - 1 : last]
        if new_name != name:
            line = node.lineno - first
            lines[line] = lines[line].replace(f"def {name}(", f"def {new_name}(", 1)
        self.texts.append("\n".join(lines))

    def _add_used(self, module_name: str, name: str) -> None:
        module = _read(module_name)
        if name in module.definitions:
            self.add(module_name, name)
        elif name in module.imports:
            imported = module.imports[name]
            if not self._is_own(imported.module):
                self.imports.add(imported)
            elif imported.original is None or imported.name != imported.original:
                raise SourceError(f"{module_name} must import {imported.module} by the names of its definitions")
            else:
                self.add(imported.module, name)

    def _is_own(self, module_name: str) -> bool:
        return module_name in self.own or module_name.partition(".")[0] == _PACKAGE

    def text(self) -> str:
        return "\n\n\n".join([self._import_lines(), *self.texts]) + "\n"

    def _import_lines(self) -> str:
        groups: dict[bool, list[str]] = {True: [], False: []}
        for module in sorted({each.module for each in self.imports}):
            of_module = sorted((each for each in self.imports if each.module == module), key=lambda each: each.name)
            standard = module.partition(".")[0] in sys.stdlib_module_names
            for each in of_module:
                if each.original is None:
                    groups[standard].append(f"import {module}" + (f" as {each.name}" if each.name != module else ""))
            names = [
                each.name if each.name == each.original else f"{each.original} as {each.name}"
                for each in of_module
                if each.original is not None
            ]
            if names:
                groups[standard].append(f"from {module} import {', '.join(names)}")
        return "\n\n".join("\n".join(lines) for lines in (groups[True], groups[False]) if lines)
