"""Joins a module and what it uses of the package into the text of one file that needs no cfpretrain.

Text is taken as it stands, definition by definition, and only what is reached from the module is taken. What the
package imports as a module (`seeds.fold`) stays a name with attributes, so nothing is renamed and no line is rewritten.
Whatever would make the flat file mean something else than its modules is refused.
"""

import ast
import builtins
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "cfpretrain"
# What a bundle may import besides the standard library. diffusers reads every import of a file before it runs it, also
# those inside functions, and names what is missing as a package to install.
_ALLOWED = {"torch", "diffusers", "numpy", "PIL"}
_ROOT = Path(__file__).parent.parent
_RULE = "# " + "-" * 75


class BundleError(Exception):
    """Modules that cannot be joined: a mistake of ours, found by the tests."""


@dataclass(frozen=True)
class _Definition:
    """A statement at the top of a module that binds names."""

    names: frozenset[str]
    text: str  # with the comment above it
    uses: frozenset[str]  # names read anywhere inside
    attributes: frozenset[tuple[str, str]]  # (name, attribute) of each `name.attribute` inside


@dataclass(frozen=True)
class _Import:
    """`import module as renamed`, or `from module import name as renamed`."""

    module: str
    name: str = ""
    renamed: str = ""

    def __str__(self) -> str:
        end = f" as {self.renamed}" if self.renamed else ""
        return f"from {self.module} import {self.name}{end}" if self.name else f"import {self.module}{end}"


@dataclass(frozen=True)
class _Module:
    """A module, taken apart."""

    name: str
    docstring: str
    definitions: tuple[_Definition, ...]
    outside: dict[str, "_Import"]  # name here -> the import that makes it
    inside: dict[str, tuple[str, str]]  # name here -> module of the package and name there; "" for the module itself

    def defining(self, name: str) -> _Definition | None:
        """The statement that binds a name; None where none does."""
        return next((one for one in self.definitions if name in one.names), None)


def bundle(module: str, stand_ins: Mapping[str, str] | None = None) -> str:
    """The text of one file that does what a module does.

    Args:
        module: its name; everything it defines is taken, and what that uses of other modules of the package.
        stand_ins: for a module's name the name of the one that takes its place.

    Raises:
        BundleError: the flat file would not mean the same.
    """
    joiner = _Joiner(dict(stand_ins or {}))
    joiner.take_all(module)
    text = joiner.text(module)
    _check_imports(text)
    return text


def content_name(stem: str, text: str) -> str:
    """A module name that no other text has: the stem and a hash."""
    return f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class _Joiner:
    def __init__(self, stand_ins: dict[str, str]) -> None:
        self._stand_ins = stand_ins
        self._modules: dict[str, _Module] = {}  # in the order in which they were first needed
        self._taken: dict[str, set[_Definition]] = {}
        self._outside: dict[str, _Import] = {}
        self._namespaces: dict[str, dict[str, set[str]]] = {}  # module -> name used for it -> attributes

    def take_all(self, name: str) -> None:
        """Takes a whole module and what it uses."""
        module = self._module(name)
        for definition in module.definitions:
            self._take(module, definition)

    def _module(self, name: str) -> _Module:
        name = self._stand_ins.get(name, name)
        if name not in self._modules:
            self._modules[name] = _parse(name)
            self._taken[name] = set()
        return self._modules[name]

    def _take(self, module: _Module, definition: _Definition) -> None:
        if definition in self._taken[module.name]:
            return
        self._taken[module.name].add(definition)
        for name in sorted(definition.uses):
            self._take_name(module, name, definition)

    def _take_name(self, module: _Module, name: str, user: _Definition) -> None:
        own = module.defining(name)
        if own is not None:
            self._take(module, own)
        elif name in module.outside:
            if self._outside.setdefault(name, module.outside[name]) != module.outside[name]:
                raise BundleError(f"{module.name}: {module.outside[name]} and {self._outside[name]} clash")
        elif name in module.inside:
            self._take_from_inside(module, name, user)
        # Else a builtin, or a name of the function's own.

    def _take_from_inside(self, module: _Module, name: str, user: _Definition) -> None:
        target, there = module.inside[name]
        other = self._module(target)
        wanted = {there} if there else {attribute for alias, attribute in user.attributes if alias == name}
        if not wanted:
            raise BundleError(f"{module.name}: module {target} is used as a value")
        if not there:
            self._namespaces.setdefault(other.name, {}).setdefault(name, set()).update(wanted)
        for attribute in sorted(wanted):
            found = other.defining(attribute)
            if found is None:
                raise BundleError(f"{module.name} uses {attribute} of {other.name}, which does not define it")
            self._take(other, found)

    def text(self, root: str) -> str:
        """What was taken, each module after those that it uses."""
        self._check_names()
        docstring = self._modules[root].docstring.strip()
        head = f'"""{docstring}\n\nGenerated by {PACKAGE} (Apache-2.0): its modules joined into one file.\n"""'
        imports = set(self._outside.values()) | ({_Import("types")} if self._namespaces else set())
        parts = [f"{head}\n\n{_import_lines(imports)}"]
        for module in self._in_order(root):
            if len(self._modules) > 1:
                parts.append(_heading(module, "" if module.name == root else module.docstring))
            parts += [one.text for one in module.definitions if one in self._taken[module.name]]
            for alias, attributes in sorted(self._namespaces.get(module.name, {}).items()):
                pairs = ", ".join(f"{attribute}={attribute}" for attribute in sorted(attributes))
                parts.append(f"{alias} = types.SimpleNamespace({pairs})")
        return "\n\n\n".join(parts) + "\n"

    def _in_order(self, root: str) -> Iterator[_Module]:
        done: list[str] = []
        under_way: list[str] = []

        def visit(name: str) -> None:
            name = self._stand_ins.get(name, name)
            if name in under_way:
                raise BundleError(f"modules import one another: {' > '.join([*under_way, name])}")
            if name in done or name not in self._modules:
                return
            under_way.append(name)
            for target, _ in self._modules[name].inside.values():
                visit(target)
            done.append(under_way.pop())

        visit(root)
        return (self._modules[name] for name in done)

    def _check_names(self) -> None:
        """Refuses two things of one name, and things named like a builtin that another module may mean."""
        owners: dict[str, str] = dict.fromkeys(self._outside, "an import")
        if self._namespaces:
            owners["types"] = "an import"
        for name, module in self._modules.items():
            for one in module.definitions:
                if one in self._taken[name]:
                    _claim(owners, one.names, name)
            for alias in self._namespaces.get(name, {}):
                _claim(owners, [alias], f"module {name}")
        _claim(owners, [name for name in owners if hasattr(builtins, name)], "python itself")


def _claim(owners: dict[str, str], names: Iterable[str], owner: str) -> None:
    for name in sorted(names):
        if name in owners:
            raise BundleError(f"{name} of {owner} clashes with {name} of {owners[name]}; rename one")
        owners[name] = owner


def _import_lines(imports: set[_Import]) -> str:
    """The standard library first, and one line for all that comes from a module."""
    names: dict[str, list[str]] = {}
    lines = []
    for one in sorted(imports, key=str):
        if one.name and not one.renamed:
            names.setdefault(one.module, []).append(one.name)
        else:
            lines.append((one.module, str(one)))
    lines += [(module, f"from {module} import {', '.join(found)}") for module, found in names.items()]
    groups: tuple[list[str], list[str]] = ([], [])
    for module, line in sorted(lines, key=lambda line: (line[1].startswith("from"), line)):
        groups[module.split(".")[0] not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(group) for group in groups if group)


def _heading(module: _Module, about: str) -> str:
    lines = [module.name, *([""] if about else []), *about.strip().splitlines()]
    return "\n".join([_RULE, *(f"# {line}".rstrip() for line in lines)])


# ---------------------------------------------------------------------------------------------------------------------
# Taking a module apart


def _parse(name: str) -> _Module:
    source = _path_of(name).read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.splitlines()
    definitions: list[_Definition] = []
    outside: dict[str, _Import] = {}
    inside: dict[str, tuple[str, str]] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            _read_import(statement, outside, inside)
        elif _is_docstring(statement, tree):
            continue
        else:
            definitions.append(_read_definition(name, statement, lines))
    bound = [*outside, *inside, *(one for definition in definitions for one in definition.names)]
    twice = sorted(one for one in set(bound) if bound.count(one) > 1)
    if twice:
        raise BundleError(f"{name} binds {twice[0]} twice; rename one")
    return _Module(name, ast.get_docstring(tree) or "", tuple(definitions), outside, inside)


def _is_docstring(statement: ast.stmt, tree: ast.Module) -> bool:
    return statement is tree.body[0] and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _read_import(
    statement: ast.Import | ast.ImportFrom, outside: dict[str, _Import], inside: dict[str, tuple[str, str]]
) -> None:
    for alias in statement.names:
        here = alias.asname or alias.name
        module = alias.name if isinstance(statement, ast.Import) else statement.module or ""
        is_ours = module.split(".")[0] == PACKAGE
        if isinstance(statement, ast.Import) and not is_ours:
            outside[here if alias.asname else here.split(".")[0]] = _Import(module, renamed=alias.asname or "")
        elif not is_ours:
            outside[here] = _Import(module, alias.name, alias.asname or "")
        elif isinstance(statement, ast.ImportFrom) and _path_of(f"{module}.{alias.name}").is_file():
            inside[here] = (f"{module}.{alias.name}", "")
        elif isinstance(statement, ast.ImportFrom) and not alias.asname and _path_of(module).is_file():
            inside[here] = (module, alias.name)
        else:
            raise BundleError(f"line {statement.lineno}: {ast.unparse(statement)} cannot be joined")


def _path_of(module: str) -> Path:
    return _ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _read_definition(module: str, statement: ast.stmt, lines: list[str]) -> _Definition:
    names = _bound_names(statement)
    if not names:
        raise BundleError(f"{module}, line {statement.lineno}: only imports and definitions can be joined")
    for inner in ast.walk(statement):
        if isinstance(inner, ast.Global):
            raise BundleError(f"{module}, line {inner.lineno}: a global statement cannot be joined")
        if isinstance(inner, ast.ImportFrom) and (inner.module or "").split(".")[0] == PACKAGE:
            raise BundleError(f"{module}, line {inner.lineno}: an import of {PACKAGE} inside a function")
    used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    attributes = {
        (node.value.id, node.attr)
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    return _Definition(names, _text_of(statement, lines), frozenset(used - names), frozenset(attributes))


def _bound_names(statement: ast.stmt) -> frozenset[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return frozenset([statement.name])
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return frozenset(node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))


def _text_of(statement: ast.stmt, lines: list[str]) -> str:
    decorators = statement.decorator_list if isinstance(statement, ast.FunctionDef | ast.ClassDef) else []
    first = min([statement.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(lines[first : statement.end_lineno])


def _check_imports(text: str) -> None:
    """Refuses a bundle that imports what its users may not have; sharper than need be, since diffusers is too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            package = module.split(".")[0]
            if package not in _ALLOWED and package not in sys.stdlib_module_names:
                raise BundleError(f"line {node.lineno}: {module or 'a relative import'} cannot be imported everywhere")
