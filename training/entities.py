"""What the standard library documents, each with its public name, signature, docstring and code.

Sources are parsed, never imported; only the modules written in C are asked for their `__doc__`.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PUBLIC_NAME = {
    "posixpath": "os.path",
    "_collections_abc": "collections.abc",
    "_pydecimal": "decimal",
    "_pyio": "io",
}
C_MODULES = {
    "builtins": "",
    "math": "math",
    "itertools": "itertools",
    "time": "time",
    "posix": "os",
    "sys": "sys",
}
C_TYPES = (str, bytes, list, dict, set, tuple, int, float)
INTERNAL = ("idlelib", "lib2to3", "turtledemo", "distutils", "ensurepip", "msilib", "tkinter", "ctypes")
"""Read as code, but not asked about."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Entity:
    """One documented thing. `signature` and `code` are empty where there is none to show."""

    name: str  # dotted and public: heapq.merge
    kind: str  # module, class, function or method
    module: str  # empty for builtins
    doc: str
    signature: str = ""
    code: str = ""


def _module_name(path: PurePosixPath) -> str:
    parts = path.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return PUBLIC_NAME.get(name, name)


def _is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def _signature(name: str, node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not inits:
            return ""
        node = inits[0]
    arguments = ast.unparse(node.args)
    for receiver in ("self", "cls"):
        if arguments == receiver or arguments.startswith(receiver + ", "):
            arguments = arguments[len(receiver) + 2 :]
    return f"{name}({arguments})"


def _from_definition(lines: list[str], module: str, owner: str, node: Definition) -> Entity | None:
    doc = ast.get_docstring(node)
    if not doc or node.name.startswith("_"):
        return None
    name = f"{owner}.{node.name}"
    if isinstance(node, ast.ClassDef):
        return Entity(name, "class", module, doc, _signature(name, node))
    code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    kind = "function" if owner == module else "method"
    return Entity(name, kind, module, doc, _signature(name, node), code)


def reexports(root: Path, files: list[PurePosixPath]) -> dict[str, str]:
    """Names that a package lifts out of its own modules: asyncio.tasks.wait is asyncio.wait."""
    lifted: dict[str, str] = {}
    for path in files:
        if path.name != "__init__.py":
            continue
        package = _module_name(path)
        for node in ast.parse((root / path).read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                for alias in node.names:
                    public = package if alias.name == "*" else f"{package}.{alias.asname or alias.name}"
                    suffix = "" if alias.name == "*" else f".{alias.name}"
                    lifted[f"{package}.{node.module}{suffix}"] = public
    return lifted


def _exported(tree: ast.Module) -> set[str] | None:
    """The names in a literal `__all__`, or None."""
    for node in tree.body:
        names = [t.id for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Assign) and "__all__" in names:
            values = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            return {value for value in values if isinstance(value, str)}
    return None


def in_source(path: PurePosixPath, source: str, lifted: dict[str, str]) -> Iterator[Entity]:
    """The documented public things of one source file, in its own order."""
    module = _module_name(path)
    if not _is_public(module) or path.parts[0] in INTERNAL:
        return
    tree, lines = ast.parse(source), source.split("\n")
    doc = ast.get_docstring(tree)
    if doc:
        yield Entity(module, "module", module, doc)
    exported = _exported(tree)
    for node in tree.body:
        if not isinstance(node, Definition):
            continue
        public = exported is None or node.name in exported
        home = lifted.get(module, module) if public else module
        home = lifted.get(f"{module}.{node.name}", f"{home}.{node.name}").rpartition(".")[0]
        entity = _from_definition(lines, home, home, node)
        if entity:
            yield entity
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for child in node.body:
                if isinstance(child, Definition):
                    method = _from_definition(lines, home, f"{home}.{node.name}", child)
                    if method:
                        yield method


def _c_entity(name: str, module: str, kind: str, thing: object) -> Entity | None:
    doc = inspect.getdoc(thing)
    if not doc:
        return None
    try:
        signature = name + str(inspect.signature(thing)) if callable(thing) else ""
    except (ValueError, TypeError):
        signature = ""
    return Entity(name, kind, module, doc, signature.replace("(self, /, ", "(").replace("(self, /)", "()"))


def in_c_modules() -> Iterator[Entity]:
    """The documented functions, types and methods of a few modules that have no Python source."""
    for module, prefix in C_MODULES.items():
        for name, thing in sorted(vars(importlib.import_module(module)).items()):
            kind = "class" if isinstance(thing, type) else "function"
            if not name.startswith("_") and callable(thing):
                entity = _c_entity(f"{prefix}.{name}".lstrip("."), prefix, kind, thing)
                if entity:
                    yield entity
    for owner in C_TYPES:
        for name, thing in sorted(vars(owner).items()):
            if not name.startswith("_") and callable(thing):
                entity = _c_entity(f"{owner.__name__}.{name}", "", "method", thing)
                if entity:
                    yield entity
