"""The map of the package is at the top of its folders, and the code follows it."""

import ast
import re
from pathlib import Path

import vmapsafe

ROOT = Path(vmapsafe.__file__).parent
# Files that use the public names, as any user does.
USERS = ("examples",)
# What they may import beyond the names of vmapsafe itself.
FOR_USERS = ("quantities.__init__", "examples.digits")


def mapped(folder=()):
    """The files of a folder, in the order in which its ``__init__`` names them."""
    text = ROOT.joinpath(*folder, "__init__.py").read_text()
    found = []
    for name in re.findall(r"^(?:# )?``([\w/]+)`` {2,}\S", text, re.MULTILINE):
        if name.endswith("/"):
            found += mapped((*folder, name[:-1]))
        else:
            found.append(".".join([*folder, name]))
    return [*found, ".".join([*folder, "__init__"])]


def files():
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in ROOT.rglob("*.py")
    }


def imports(path):
    """(what a file imports from the package, whether inside a function)"""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        assert not node.level, path
        module = (node.module or "").split(".")
        if module[0] == "vmapsafe":
            for alias in node.names:
                # A file, a folder's file, or a name out of a file.
                name = [*module[1:], alias.name]
                known = ROOT.joinpath(*name).with_suffix(".py").exists()
                folder = ROOT.joinpath(*name).is_dir()
                name = name if known else [*name, "__init__"] if folder else name[:-1]
                yield ".".join(name) or "__init__", node not in tree.body


def test_maps_name_every_file():
    found = mapped()
    assert len(found) == len(set(found))
    assert set(found) == files().keys()


def test_imports_follow_the_maps():
    """Each file imports only from files above it in the map, at its top."""
    order = mapped()
    for name, path in files().items():
        for imported, inside in imports(path):
            assert not inside, (name, imported)
            user = name.startswith(USERS) or name == "__main__"
            if imported == "__init__":
                assert user, name
            elif name.startswith(USERS):
                assert imported in FOR_USERS, (name, imported)
            elif name != "__init__":
                assert order.index(imported) < order.index(name), (name, imported)


def test_rules_do_not_know_blocks():
    """A rule sees a call and where it was made, and nothing of what is open."""
    for name, path in files().items():
        if name.startswith("rules."):
            for imported, _ in imports(path):
                assert not imported.startswith(("_block", "_rows")), (name, imported)


def test_private_names_of_torch():
    """They are in one file, except operators and attributes of modules."""
    private = re.compile(
        r"torch\._[A-Za-z]|torch\.(?!ops)\w+\._|torch\.overrides|"
        r"^from torch[\w.]*\._|^from torch\S* import .*\b_[a-zA-Z]",
        re.MULTILINE,
    )
    for name, path in files().items():
        if name != "_torch":
            assert not private.search(path.read_text()), name


def test_tests_do_not_import_tests():
    """Code that several tests use is in tests/support."""
    for path in Path(__file__).parent.rglob("*.py"):
        assert not re.search(r"(?m)^\s*(from|import) test_", path.read_text()), path
