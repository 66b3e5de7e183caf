"""README.rst: what its Python blocks print is what their comments say.

The blocks run one after another in one namespace, as a reader would paste them. Each
``print(...)  # text`` prints that text. A comment ``# RuntimeError: text`` in the line
after a statement says what that statement raises. A ``text`` block after a Python block
is all that the Python block printed.
"""

import ast
import contextlib
import io
import os
import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.rst"
TEXT = README.read_text()
_BLOCK = re.compile(r"^\.\. code-block:: (python|text)\n\n((?:    .*\n|\n)+)", re.M)
_RAISES = re.compile(r"# (\w*(?:Error|Warning)): (.*)")


def blocks():
    """(line number, code, what follows as a block of text or None), in order."""
    found = []
    for match in _BLOCK.finditer(TEXT):
        line = TEXT[: match.start(2)].count("\n") + 1
        body = re.sub(r"^    ", "", match[2], flags=re.M).strip("\n") + "\n"
        if match[1] == "python":
            found.append([line, body, None])
        elif found and found[-1][2] is None:
            found[-1][2] = body
    return found


def run(code, line, namespace):
    """Run the statements of a block; return what they printed, and its comments.

    Args:
        code: the block.
        line: of the README, where it begins.
        namespace: of all blocks.

    Returns:
        What was printed, and what the comments behind each print say, if any do.
    """
    lines, printed, said = code.splitlines(), io.StringIO(), []
    for statement in ast.parse(code).body:
        first, last = statement.lineno - 1, statement.end_lineno
        after = "\n".join(lines[last : last + 1]).strip()
        raised = _RAISES.match(after)
        tree = ast.increment_lineno(ast.Module([statement], []), line - 1)
        program = compile(tree, str(README), "exec")
        with contextlib.redirect_stdout(printed):
            if raised is None:
                exec(program, namespace)
            else:
                with pytest.raises(Exception, match=re.escape(raised[2])) as error:
                    exec(program, namespace)
                assert type(error.value).__name__ == raised[1]
        source = "\n".join(lines[first:last])
        said += re.findall(r"^ *print\(.*\)  # (.*)$", source, re.M)
    return printed.getvalue(), said


@pytest.fixture
def one_process(monkeypatch, tmp_path):
    """What torchrun sets for one process of one."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.chdir(tmp_path)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_the_code_of_the_readme(one_process):
    """It runs as it stands, and prints what it says."""
    namespace = {"__name__": "readme"}
    found = blocks()
    assert len(found) > 10
    for line, code, text in found:
        printed, said = run(code, line, namespace)
        where = f"README.rst, the block at line {line}"
        if text is not None and not said:
            assert printed == text, where
        else:
            assert printed.splitlines() == said, where


def test_a_wrong_comment_is_seen():
    """The test above can fail."""
    assert run("print(1)  # 2\n", 1, {}) == ("1\n", ["2"])
    assert run("1 / 0\n# ZeroDivisionError: division\nprint(3)\n", 1, {})[0] == "3\n"
    with pytest.raises(pytest.fail.Exception):
        run("1 / 1\n# ZeroDivisionError: division\n", 1, {})


def test_what_it_names_exists():
    """Links to files, and modules to run."""
    root = README.parent
    for path in re.findall(r"<((?:bench|tests|vmapsafe)/[\w./-]+)>`_", TEXT):
        assert (root / path).exists(), path
    for path in re.findall(r"^\.\. image:: (\S+)", TEXT, re.M):
        assert (root / path).exists(), path
    for name in re.findall(r"python -m (vmapsafe[\w.]*)", TEXT):
        file = root / name.replace(".", os.sep)
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists()
