"""Reads a package's source: what its modules import and define, and which names they use."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True, order=True)
class Name:
    """A top-level name of a module, or with ``name=""`` the module itself."""

    module: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".rstrip(".")


@dataclass(frozen=True)
class Module:
    """Python source: a file, or a block of a page.

    Args:
        text: The source.
        package: The package that it is in, or is; relative imports start there.
        stub: Source of the ``.pyi`` file beside it, which says what it exports lazily.
    """

    text: str
    package: str = ""
    stub: str = ""

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> list[tuple[int, str, Name]]:
        """Line, local name and meaning of all that it imports: in functions, and for types only, too."""
        return list(_imports(self.tree, self.package))

    @cached_property
    def bound(self) -> dict[str, Name]:
        """What imported names mean, those of the stub too."""
        lazy = _imports(ast.parse(self.stub), self.package)
        return {local: name for _, local, name in [*lazy, *self.imports]}

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        """Functions, classes and constants of the top level, also under conditions; no type variables."""
        found: dict[str, Definition] = {}
        for node in _top_level(self.tree.body):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.setdefault(node.name, node)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and not _is_type_variable(node):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                leaves = [leaf for target in targets for leaf in ast.walk(target)]
                names = [leaf.id for leaf in leaves if isinstance(leaf, ast.Name)]
                found |= {name: node for name in names if name not in found}
        return found

    @cached_property
    def called_as_script(self) -> set[str]:
        """Names that it uses where it is run as a script."""
        return {
            leaf.id
            for node in self.tree.body
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
            for leaf in ast.walk(node)
            if isinstance(leaf, ast.Name)
        }


class Package:
    """All modules of a package.

    Args:
        root: Folder that holds the package's folder.
        name: The package's name.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        self.paths = {
            ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
            for path in sorted((root / name).rglob("*.py"))
        }
        self.modules = {module: _read(module, path) for module, path in self.paths.items()}
        self._dotted = re.compile(rf"\b{name}(?:[.:][A-Za-z_]\w*)+")

    def place(self, name: Name) -> str:
        """File and line of a definition."""
        return self.line(name.module, self.modules[name.module].definitions[name.name].lineno)

    def line(self, module: str, number: int) -> str:
        """A line of a module as editors open it: ``package/module.py:7``."""
        return f"{self.paths[module].relative_to(self.root).as_posix()}:{number}"

    def find(self, name: Name) -> Name | None:
        """Where a name is defined that a module may have imported; None if not in this package."""
        module = self.modules.get(name.module)
        if module is None or not name.name or name.name in module.definitions:
            return name if module else None
        origin = module.bound.get(name.name, name)
        return self.find(origin if origin != name else Name(str(name)))

    def find_dotted(self, dotted: str) -> Name | None:
        """Where ``package.module.name`` or ``package.module:name`` is defined; None if nowhere."""
        parts = dotted.replace(":", ".").split(".")
        ends = [n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in self.modules]
        return self.find(Name(".".join(parts[: ends[-1]]), *parts[ends[-1] : ends[-1] + 1]))

    def dotted_names(self, text: str) -> set[str]:
        """Names in a text that begin with the package's."""
        return set(self._dotted.findall(text))

    def edges(self, importer: str) -> dict[str, int]:
        """Modules that a module imports, each with the first line that does.

        An import also runs the ``__init__`` of every package around what it names. These count, except those
        of packages that the importer is in. A lazily exported name also imports the module that defines it.
        """
        found: dict[str, int] = {}
        for line, name in self._referred(self.modules[importer]):
            for target in self._run_by(name):
                around = [target[:end] for end, letter in enumerate(target) if letter == "."]
                outside = [each for each in around if not f"{importer}.".startswith(f"{each}.")]
                for each in {target, *outside} - {importer}:
                    found[each] = min(line, found.get(each, line))
        return found

    def _run_by(self, name: Name) -> set[str]:
        module = self.modules.get(name.module)
        if module is None:
            return set()
        if name.name not in {*module.definitions, *module.bound} and str(name) in self.modules:
            return {str(name)}
        origin = self.find(name)
        return {name.module, origin.module} if module.stub and origin else {name.module}

    def uses(self, module: Module) -> set[Name]:
        """Definitions that a module names: in imports, its stub, attributes, or a string of their path."""
        names = {self.find(name) for name in module.bound.values()}
        names |= {self.find(name) for _, name in self._referred(module)}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and self._dotted.fullmatch(str(node.value)):
                names.add(self.find_dotted(str(node.value)))
        return {name for name in names if name is not None}

    def _referred(self, module: Module) -> Iterator[tuple[int, Name]]:
        """Lines and names of what is imported, and of attributes of imported modules."""
        yield from ((line, name) for line, _, name in module.imports)
        bound = {local: name for _, local, name in module.imports}
        for node in ast.walk(module.tree):
            at, attributes = node, []
            while isinstance(at, ast.Attribute):
                attributes.append(at.attr)
                at = at.value
            holder = self.find(bound[at.id]) if isinstance(at, ast.Name) and at.id in bound else None
            while attributes and holder is not None and not holder.name:
                attribute = Name(holder.module, attributes.pop())
                yield node.lineno, attribute
                holder = self.find(attribute)

    def shown(self, name: Name) -> set[Name]:
        """Definitions of the same module in a signature: annotations, also of a class's public members."""
        definitions = self.modules[name.module].definitions
        annotations = _annotations(definitions[name.name]) if name.name else ()
        leaves = [leaf for annotation in annotations for leaf in ast.walk(annotation)]
        names = {leaf.id for leaf in leaves if isinstance(leaf, ast.Name)}
        return {Name(name.module, each) for each in names & set(definitions)}


def python_blocks(text: str) -> list[Module]:
    """Blocks of Python in a page."""
    return [Module(block) for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]


def notebook_code(path: Path) -> Module:
    """All cells of code in a notebook."""
    cells = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return Module("\n".join("".join(cell) for cell in cells))


def _read(module: str, path: Path) -> Module:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    stub = path.with_suffix(".pyi")
    return Module(path.read_text(), package, stub.read_text() if stub.exists() else "")


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str, Name]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, Name(alias.name)
                if not alias.asname:  # `import a.b` binds `a`
                    top = alias.name.split(".")[0]
                    yield node.lineno, top, Name(top)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, Name(module, alias.name)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _top_level([*node.body, *node.orelse])
            for handler in getattr(node, "handlers", []):
                yield from _top_level(handler.body)


def _is_type_variable(node: ast.Assign | ast.AnnAssign) -> bool:
    return isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ("TypeVar", "ParamSpec")


def _annotations(node: ast.stmt) -> Iterator[ast.expr]:
    if isinstance(node, ast.ClassDef):
        for each in node.body:
            if not isinstance(each, ast.FunctionDef) or not re.match("_(?!_)", each.name):
                yield from _annotations(each)
    elif isinstance(node, ast.FunctionDef):
        every = [argument.annotation for argument in ast.walk(node.args) if isinstance(argument, ast.arg)]
        yield from (_parsed(annotation) for annotation in [*every, node.returns] if annotation is not None)
    elif isinstance(node, ast.AnnAssign):
        yield _parsed(node.annotation)
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
        yield node.value  # an alias of a type


def _parsed(annotation: ast.expr) -> ast.expr:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return ast.parse(annotation.value, mode="eval").body
    return annotation
