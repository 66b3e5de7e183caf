"""One direction of imports: each file imports only from those named above it."""

import ast
from pathlib import Path

import vmapsafe
from vmapsafe import examples

ROOT = Path(vmapsafe.__file__).parent
# Bottom up; what stands to the right is all a file may import from the package.
LAYERS = {
    "_errors": set(),
    "_groups": set(),
    "_call": {"_groups"},
    "_memory": set(),
    "_rule": {"_call"},
    "_here": {"_call"},
    "_switched": {"_call", "_errors", "_here"},
    "_state": {"_call", "_errors", "_switched"},
    "rules.batch_norm": {"_call", "_errors", "_groups", "_rule"},
    "rules.buffers": {"_call", "_rule"},
    "rules.random_numbers": {"_call", "_rule"},
    "rules.sync": {"_call", "_errors", "_rule", "_state", "rules.batch_norm"},
    "rules.regimes": set(),
    "rules.attention": {"_call", "_rule"},
    "rules.convolution": {"_call", "_rule", "rules.regimes"},
    "rules.embedding": {"_call", "_memory", "_rule"},
    "rules.group_norm": {"_call", "_rule", "rules.batch_norm", "rules.regimes"},
    "rules.layer_norm": {"_call", "_rule", "rules.batch_norm", "rules.regimes"},
    "rules.layouts": {"_call", "_rule"},
    "rules.linear": {"_call", "_rule", "rules.regimes"},
    "rules.native_batch_norm": {"_call", "_rule", "rules.batch_norm", "rules.regimes"},
    "rules.__init__": {"rules"},
    "_operators": {"_call", "_here", "_rule"},
    "_again": {"_call", "_errors", "_here"},
    "_scope": {
        *("_again", "_call", "_errors", "_groups", "_here", "_operators", "_rule"),
        *("_state", "_switched"),
    },
    "_advice": {"_call", "_state"},
    "_wrap": {"_advice", "_call", "_errors", "_groups", "_rule", "_scope", "_switched"},
    "_chunks": {"_call", "_errors"},
    "_batched": {"_call", "_chunks", "_errors"},
    "_formulas": {"_call", "rules.batch_norm", "rules.convolution", "rules.regimes"},
    "_copies": {"_call", "_errors", "rules.buffers"},
    "_record": {
        *("_call", "_copies", "_formulas"),
        *("rules.batch_norm", "rules.native_batch_norm"),
    },
    "_samples": {
        *("_call", "_chunks", "_copies", "_errors", "_record", "_scope"),
        *("_state", "_wrap"),
    },
    "_turns": {"_errors", "_here"},
    "_processes": {"_errors"},
    "_per_sample": {
        *("_call", "_chunks", "_errors", "_formulas", "_groups", "_record"),
        *("_samples", "_scope", "_turns"),
    },
    "_norms": {
        *("_call", "_chunks", "_errors", "_formulas", "_groups", "_processes"),
        *("_samples", "_scope", "_turns"),
    },
    "_sketch": {
        *("_call", "_chunks", "_errors", "_formulas", "_groups", "_processes"),
        *("_samples", "_scope", "_turns", "rules.batch_norm"),
    },
    "_disk": {"_errors"},
    "_over": {"_call", "_disk", "_errors", "_state"},
    "_convert": {"_groups"},
    "_report": {"_rule"},
    "_trial": {"_call", "_scope"},
    "_check": {
        *("_advice", "_call", "_errors", "_groups", "_report", "_rule", "_scope"),
        *("_state", "_switched", "_trial", "_wrap"),
    },
    "testing": {"_call", "_operators", "_rule"},
    "__init__": {
        *("_batched", "_check", "_convert", "_errors", "_norms", "_over"),
        *("_per_sample", "_sketch"),
        *("_wrap", "rules"),
    },
    # Users of the public names, as anybody's code is.
    "_demo": {"per_sample_grad_norms"},
    "examples.__init__": set(),
    "examples.digits": set(),
    "examples.attribution": {"examples", "over", "per_sample_sketch"},
    "examples.clipped_training": {"clipped_grad_sum", "examples", "vmap_safe"},
    "examples.ensemble": {"examples", "vmap_safe"},
    "examples.maml": {"examples", "vmap_safe"},
    "examples.ntk": {"examples", "vmap_safe"},
    "__main__": {"__version__", "_check", "_demo", "_report"},
}


def imports(path):
    """(names imported from the package, whether one stands inside a function)"""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    found, inside = set(), False
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "vmapsafe"
        ):
            rest = node.module.removeprefix("vmapsafe").removeprefix(".")
            names = [rest] if rest else [alias.name for alias in node.names]
            found.update(names)
            inside |= node not in top
        assert not (isinstance(node, ast.ImportFrom) and node.level), path
    return found, inside


def test_imports_follow_the_table():
    """Every file is in the table, imports what it says, and nothing in a function."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in ROOT.rglob("*.py")
    }
    assert files.keys() == LAYERS.keys()
    for name, path in files.items():
        found, inside = imports(path)
        assert found <= LAYERS[name], name
        assert not inside, name


def test_private_names_of_torch():
    """torch._C, torch.overrides._x and the like stand in four files."""
    allowed = {"_scope.py", "_call.py", "_again.py", "_here.py"}
    for path in ROOT.rglob("*.py"):
        if path.name not in allowed:
            text = path.read_text()
            assert "torch._C" not in text and "torch.overrides" not in text, path


def test_map_of_the_package():
    """The package's docstring names every file."""
    for name in LAYERS:
        folder, _, file = name.rpartition(".")
        if folder == "examples" and file not in ("__init__", "digits"):
            assert f"``{file}``" in examples.__doc__, name
        elif not folder and name not in ("__init__", "testing"):
            assert f"``{name}``" in vmapsafe.__doc__, name
    for folder in ("rules", "examples"):
        assert f"``{folder}/``" in vmapsafe.__doc__, folder
