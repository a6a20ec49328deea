"""What the tests share: the tiny model, its data, and the real command line."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

os.environ.setdefault("WANDB_MODE", "offline")
os.environ["PATH"] = (
    f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # one ninja for all that tests start
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow may take an hour; the timeout of pyproject.toml is for the others."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(7200))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with the tiny model, four blocks deep, and its tokenizer."""
    from tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny") / "model", hidden=64, layers=4)


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """A JSONL file of 48 prompts with completions."""
    from tiny import WORDS

    draw = random.Random(0).choice
    lines = [
        {
            "prompt": f"Tell me something {draw(WORDS)} about the {draw(['city', 'film', 'book', 'dog'])} {i}.",
            "completion": f"I {draw(['love', 'hate'])} the {draw(WORDS)} day.",
        }
        for i in range(48)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
