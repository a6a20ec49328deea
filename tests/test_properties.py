"""Random command lines and random rows: taken or refused on one line, never a traceback, and nothing is left behind.

The examples are the same in every run (`derandomize`), so a failure is one for everybody.
"""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from test_cli import MANDATORY, command, invoke, make_work, snapshot

from alignkit.config import stages
from alignkit.core.errors import InputError
from alignkit.data.dataset import Data

RULES = {
    "derandomize": True, "deadline": None, "database": None,
    "phases": [Phase.generate],  # no shrinking: a failure takes no longer than a pass
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("properties") / "work")


@lru_cache
def keys(name: str) -> list[str]:
    """Every dotted key of a command's config."""
    from test_house import complete, composed

    def walk(node: DictConfig, prefix: str) -> list[str]:
        found = []
        for key in node:
            child = None if OmegaConf.is_missing(node, key) else node[key]
            found += [f"{prefix}{key}", *(walk(child, f"{prefix}{key}.") if isinstance(child, DictConfig) else [])]
        return found

    return [*walk(composed(name, *complete(name)), ""), *stages.GROUPS]


# What people type, and what they type by mistake.
LETTERS = "abcz_.=,:@~+${}[]()'\"\\/ \t-0189é🙂"
VALUES = st.one_of(
    st.sampled_from(["", "null", "true", "nan", "inf", "-inf", "???", "{}", "[]", "[1,x]", "{a:1}", "${seed}", "${nope}"]),
    st.sampled_from(["lora", "full", "vllm", "hf", "ppo", "grpo", "1,2", "'", "~", "runs/base/sft", "answers.jsonl", "."]),
    st.integers(-(2**70), 2**70).map(str), st.floats().map(str), st.text(LETTERS, max_size=12),
)  # fmt: skip


@st.composite
def overrides(draw) -> tuple[str, list[str]]:
    """(command, one to three overrides): real keys, real keys with a letter changed, and no keys at all."""
    name = draw(st.sampled_from(sorted(MANDATORY)))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(keys(name)))
        if draw(st.booleans()):
            at = draw(st.integers(0, len(key)))
            key = key[:at] + draw(st.sampled_from(LETTERS)) + key[at + 1 :]
        sign = draw(st.sampled_from(["", "", "", "+", "++", "~"]))
        found.append(f"{sign}{key.lstrip('-')}={draw(VALUES)}")
    return name, found


@settings(max_examples=40, **RULES)
@given(overrides())
def test_a_random_command_line_is_taken_or_refused_on_one_line(work, line):
    name, given_overrides = line
    before = snapshot(work)
    result = invoke(*command(name, *given_overrides, "dry_run=true"), cwd=work)
    assert result.code in (0, 2), result.err
    assert (result.code == 2) == (result.err.startswith("alignkit: ") and result.err.count("\n") == 1), result.err
    assert "Traceback" not in result.err + result.out
    assert snapshot(work) == before


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("p"))
VALUE = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "bot", ""]), "content": SCALARS}
)
FIELD = st.one_of(st.text(min_size=1, max_size=8), st.lists(MESSAGE, max_size=3), VALUE)
NAMES = st.sampled_from(["prompt", "completion", "messages", "chosen", "rejected", "reference", "x"])
ROW = st.one_of(st.dictionaries(NAMES, FIELD, max_size=4), VALUE)
FILE = st.one_of(
    st.lists(ROW.map(json.dumps), max_size=4).map(lambda lines: "\n".join(lines).encode()),
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
)


@settings(max_examples=20, **RULES)
@given(st.sampled_from(["sft", "reward", "ppo", "sample", "evaluate"]), FILE)
def test_random_rows_at_a_command_are_taken_or_refused_on_one_line(work, name, raw):
    (work / "random.jsonl").write_bytes(raw)
    result = invoke(*command(name, "data.path=random.jsonl", "dry_run=true"), cwd=work)
    assert result.code in (0, 2), result.err
    assert (result.code == 2) == (result.err.startswith("alignkit: ") and result.err.count("\n") == 1), result.err


@settings(max_examples=400, **RULES)
@given(st.sampled_from(["sft", "preference", "prompt"]), FILE, st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
def test_random_rows_are_read_or_refused_on_one_line(work, kind, raw, suffix):
    path = work / f"random{suffix}"
    path.write_bytes(raw)
    try:
        rows = Data(path=str(path)).rows(kind)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        for row in rows:
            assert all(row[name] for name in ("prompt",) if name in row)
