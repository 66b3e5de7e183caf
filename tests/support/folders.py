"""What a folder of ``over(...).save`` holds, by its files alone."""

import json
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of each file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def counted(folder: Path) -> list[int]:
    """The batches that a folder counts."""
    if not (folder / "state.json").exists():
        return []
    done = json.loads((folder / "state.json").read_text())["batches"]
    ahead = []
    for path in folder.glob("*.jsonl"):
        lines = path.read_text().split("\n")[1:-1]
        ahead += [json.loads(line)["batch"] for line in lines]
    return [*range(done), *[batch for batch in ahead if batch >= done]]
