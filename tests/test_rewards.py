"""Rewards that people bring: functions of other libraries' forms, and what lies beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer

from alignkit.check.contents import _source
from alignkit.core.errors import InputError, RunError
from alignkit.core.types import Rollouts
from alignkit.rewards.base import Context
from alignkit.rewards.function import Function

ANSWERS = ["good good day", "bad"]
META = [
    {"prompt": "Say good.", "answer": "good", "data_source": "mine", "ground_truth": "good"},
    {"prompt": [{"role": "user", "content": "Say bad."}], "answer": "bad", "data_source": "mine",
     "reward_model": {"ground_truth": "bad", "style": "rule"}},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def rollouts(tokenizer):
    """Two answers that end, of other lengths; the second row's prompt is a list of messages."""
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in ANSWERS]
    longest = max(map(len, ids))
    response = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in ids])[:, None]
    ones = torch.ones(2, 3, dtype=torch.bool)
    return Rollouts(
        prompt_ids=torch.full((2, 3), 9), prompt_mask=ones, response_ids=response, response_mask=mask,
        rollout_logprobs=torch.zeros(2, longest), finished=torch.ones(2, dtype=torch.bool), meta=META, policy_version=1,
    )  # fmt: skip


@pytest.fixture
def reward(tmp_path, tokenizer, rollouts):
    """Write a file, and score the two answers with a name in it."""

    def run(source: str, name: str = "score", file: str = "own.py") -> list[float]:
        (tmp_path / file).write_text(source)
        return Function(target=f"{tmp_path}/{file}:{name}").start(Context(tokenizer))(rollouts).tolist()

    return run


COUNTS = [2.0, 0.0]  # how often "good" stands in each of ANSWERS
FORMS = {
    "ours": "def score(prompts, responses, meta): return [r.count('good') for r in responses]",
    "ours in another order": "def score(meta, responses, prompts): return [r.count('good') for r in responses]",
    "ours by keyword only": "def score(*, prompts, responses, meta): return [r.count('good') for r in responses]",
    "ours under other names": "def score(p, r, m, word='good'): return [a.count(word) for a in r]",
    "ours, the rest in kwargs": "def score(responses, **rest): return [r.count('good') for r in responses]",
    "TRL": """
def score(completions, **kwargs):
    assert kwargs["answer"] == ["good", "bad"] and len(kwargs["prompts"]) == 2
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [t.count("good") for t in texts]
""",
    "TRL with prompts and a column": """
def score(prompts, completions, answer):
    assert answer == ["good", "bad"] and prompts[1] == [{"role": "user", "content": "Say bad."}]
    assert completions == ["good good day", [{"role": "assistant", "content": "bad"}]]
    return [2, 0]
""",
    "TRL with token ids": """
def score(completions, completion_ids, **kwargs):
    assert all(isinstance(ids, list) and ids[-1] == 3 for ids in completion_ids)
    return [len(completion_ids[0]) - len(completion_ids[0]) + 2, 0]
""",
    "TRL with what only its trainer has": "def score(completions, trainer_state=None): return [2, 0]",
    "verl": """
def score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "mine" and ground_truth in ("good", "bad")
    return solution_str.count("good")
""",
    "verl with a dict": """
def score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": solution_str.count("good"), "acc": True}
""",
    "a coroutine": """
import asyncio
async def score(prompts, responses, meta):
    await asyncio.sleep(0)
    return [r.count("good") for r in responses]
""",
    "a coroutine of TRL's": "async def score(completions, **kwargs): return [2, 0]",
    "a coroutine a row": """
import asyncio
together = []
async def score(data_source, solution_str, ground_truth, extra_info=None):
    together.append(solution_str)
    await asyncio.sleep(0.01)
    assert len(together) == 2  # all rows of a batch wait at once
    return solution_str.count("good")
""",
    "a class": """
class score:
    def __init__(self, word="good"): self.word = word
    def __call__(self, prompts, responses, meta): return [r.count(self.word) for r in responses]
""",
    "a class with a coroutine": """
class score:
    async def __call__(self, completions, **kwargs): return [2, 0]
""",
    "an object": """
class Scorer:
    def __init__(self, word): self.word = word
    def __call__(self, prompts, responses, meta): return [r.count(self.word) for r in responses]
score = Scorer("good")
""",
    "a partial": """
import functools
def count(word, prompts, responses, meta): return [r.count(word) for r in responses]
score = functools.partial(count, "good")
""",
    "a partial of a coroutine": """
import functools
async def count(completions, word, **kwargs): return [2, 0]
score = functools.partial(count, word="good")
""",
    "decorated": """
import functools
def twice(f):
    @functools.wraps(f)
    def inner(*args, **kwargs): return [2 * x for x in f(*args, **kwargs)]
    return inner
@twice
def score(completions, **kwargs): return [1, 0]
""",
    "numpy": "import numpy\ndef score(prompts, responses, meta): return numpy.array([2, 0])",
    "torch": "import torch\ndef score(prompts, responses, meta): return torch.tensor([2.0, 0.0])",
    "numbers of numpy and torch": """
import numpy, torch
def score(prompts, responses, meta): return [numpy.float32(2), torch.tensor(0)]
""",
    "truths": "def score(prompts, responses, meta): return (x > 0 for x in (True, False))",
}


@pytest.mark.parametrize("form", FORMS)
def test_functions_of_every_form_score_the_same_answers(reward, form):
    wanted = [1.0, 0.0] if form == "truths" else COUNTS
    assert reward(FORMS[form]) == wanted


def test_a_method_is_a_reward(reward):
    source = "class Scorer:\n    def good(self, prompts, responses, meta): return [2, 0]\nscorer = Scorer()\n"
    assert reward(source, "scorer.good") == COUNTS
    with pytest.raises(InputError, match=r"takes .self, prompts, responses, meta"):
        reward(source, "Scorer.good")


UNFIT = {
    "def score(response): return 1.0": "takes .response.; expected score.prompts, responses, meta",
    "def score(prompts, responses): return []": "takes .prompts, responses.",
    "def score(prompts, responses, meta, more): return []": "takes .prompts, responses, meta, more.",
    "def score(responses, meta, prompt): return []": "takes .responses, meta, prompt.",
    "def score(*args, **kwargs): return []": "functools.wraps",
    "score = max": "cannot be read",
    "score = 3": "has no function 'score'",
    "class score: pass": "has no __call__",
    "class score:\n    def __init__(self, word): pass\n    def __call__(self, prompts, responses, meta): pass": "needs arguments.*word",
    "class score:\n    def __call__(self, text): pass": "takes .text.",
    "def score(completions, trainer_state): return []": "asks for trainer_state",
    "raise SystemExit(3)": "does not load: SystemExit: 3",
    "import no_such_thing": "no_such_thing",
}


@pytest.mark.parametrize("source", UNFIT)
def test_what_does_not_fit_is_refused_before_the_start(tmp_path, source):
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(InputError, match=UNFIT[source]) as refused:
        Function(target=f"{tmp_path}/own.py:score").adapted()
    assert "own.py:score" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("form", ["TRL", "verl", "a coroutine", "a class"])
def test_only_a_plain_function_of_three_is_handed_out_bare(tmp_path, form):
    (tmp_path / "own.py").write_text(FORMS[form])
    with pytest.raises(InputError, match=r"prompts.*responses.*meta"):
        Function(target=f"{tmp_path}/own.py:score").load()


NO_NUMBERS = {
    "[1.0, None]": "score None for response 'bad' .row 1 of this batch",
    "[float('nan'), 1.0]": "score nan for response 'good good day' .row 0",
    "[1.0, float('inf')]": "score inf",
    "[1.0, 1e39]": "score 1e.39",  # more than float32 holds
    "[1.0, 10**400]": "score 1000",
    "[1.0, '2']": "score '2'",
    "[1.0, {'score': 2}]": "score {'score': 2}",
    "[1.0, 2j]": "score 2j",
    "[1.0]": "1 scores for 2 responses",
    "[1.0] * 3": "3 scores for 2 responses",
    "1.0": "returned 1.0 .float.; expected a list of 2 numbers",
    "None": "returned None",
    "'ab'": "returned 'ab'",
    "{'a': 1.0, 'b': 2.0}": "dict",
    "{1.0, 2.0}": "set",
    "__import__('torch').zeros(2, 1)": "score tensor",
    "__import__('torch').zeros(2, 2)": "score tensor",
    "__import__('torch').zeros(())": "returned tensor",
    "[[1.0], [2.0]]": r"score \[1.0\]",
    "1 / 0": "ZeroDivisionError: division by zero .own.py, line 1.",
    "exit(3)": "SystemExit: 3",
}


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_number_names_the_reward_and_the_row(reward, value):
    with pytest.raises(RunError, match=NO_NUMBERS[value]) as failed:
        reward(f"def score(prompts, responses, meta): return {value}")
    assert "own.py:score" in str(failed.value) and "\n" not in str(failed.value)


def test_a_row_without_a_wanted_column_is_named_before_the_start(tmp_path):
    (tmp_path / "own.py").write_text("def score(completions, answer, hint=None): return [0.0 for _ in completions]")
    function = Function(target=f"{tmp_path}/own.py:score")
    form = function.adapted()[1]
    function.check_rows([{"prompt": "p", "answer": "a"}], form, "rewards.mine")
    with pytest.raises(
        InputError, match=r"rewards.mine.target=.*column 'answer', which row 2 of data.path lacks .*hint, prompt"
    ):
        function.check_rows([{"prompt": "p", "answer": "a"}, {"prompt": "q", "hint": "h"}], form, "rewards.mine")


def test_a_column_that_some_rows_lack_is_none_there_as_in_datasets(reward):
    source = "def score(completions, **rest):\n    assert rest['ground_truth'] == ['good', None]\n    return [2, 0]"
    assert reward(source) == COUNTS


def test_a_function_may_change_its_rows_and_its_directory(reward, rollouts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    source = """
import os
def score(prompts, responses, meta):
    os.chdir("sub")
    for row in meta: row.pop("prompt"); row["answer"] = None
    prompts[1].clear()
    return [2, 0]
"""
    assert reward(source) == COUNTS
    assert rollouts.meta == META and META[1]["prompt"] and META[0]["answer"] == "good"
    assert Path.cwd() == tmp_path


# ------------------------------------------------------------------------------------------- files beside the function


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_modules_beside_it_can_be_imported_early_and_late(reward, tmp_path):
    deep = "from scale_of_mine import SCALE\n"
    write(tmp_path, {"scale_of_mine": "SCALE = 2\n", "late_one": "ZERO = 0\n", "parts/deep": deep})
    source = """
from scale_of_mine import SCALE
from .late_one import ZERO as nought
import parts.deep
def score(prompts, responses, meta):
    from late_one import ZERO
    assert nought == ZERO
    return [parts.deep.SCALE, ZERO]
"""
    assert reward(source) == COUNTS
    assert not {"scale_of_mine", "late_one", "parts", "parts.deep"} & set(sys.modules)
    assert str(tmp_path) not in sys.path


def test_two_files_of_one_name_have_each_its_own_neighbours(tmp_path, tokenizer, rollouts):
    scorers = []
    for number, folder in enumerate(("one", "two")):
        own = """
import helper
def score(prompts, responses, meta):
    import helper as late
    return [helper.VALUE, late.VALUE]
"""
        write(tmp_path / folder, {"helper": f"VALUE = {number}\n", "own": own})
        scorers.append(Function(target=f"{tmp_path / folder}/own.py:score").start(Context(tokenizer)))
    assert [scorer(rollouts).tolist() for scorer in scorers] == [[0.0, 0.0], [1.0, 1.0]]


def test_a_package_imports_its_parts(tmp_path, tokenizer, rollouts):
    own = """
from ..common import TWO
from .. import BASE
from .near import ZERO
from kit.common import TWO as same
def score(prompts, responses, meta): return [TWO * BASE * same / 2, ZERO]
"""
    files = {
        "kit/__init__": "BASE = 1\n",
        "kit/common": "TWO = 2\n",
        "kit/rewards/__init__": "",
        "kit/rewards/own": own,
    }
    write(tmp_path, files | {"kit/rewards/near": "ZERO = 0\n", "kit/rewards/far": ""})
    function = Function(target=f"{tmp_path}/kit/rewards/own.py:score")
    assert function.start(Context(tokenizer))(rollouts).tolist() == COUNTS
    names = {path.relative_to(tmp_path).as_posix() for path in function.source_files()}
    assert names == {f"{name}.py" for name in (*files, "kit/rewards/near")}


def test_a_neighbour_hides_nothing_of_the_standard_library_and_nothing_for_others(reward, tmp_path):
    write(tmp_path, {"statistics": "mean = None\n", "numpy": "VALUE = 2\n"})
    (tmp_path / "json").mkdir()
    import numpy

    source = """
import json, numpy, statistics
def score(prompts, responses, meta): return [numpy.VALUE * statistics.mean(json.loads("[1, 1]")), 0]
"""
    assert reward(source) == COUNTS
    assert sys.modules["numpy"] is numpy


def test_an_edited_neighbour_is_seen_and_nothing_is_run_to_see_it(tmp_path):
    own = "import helper, os\nopen('ran', 'w')\ndef score(p, r, m): pass\n"
    write(tmp_path, {"own": own, "helper": "import deeper\n", "deeper": "A = 1\n"})
    function = Function(target=f"{tmp_path}/own.py:score")
    before = _source(function)
    assert _source(function) == before
    (tmp_path / "deeper.py").write_text("A = 2\n")
    after = _source(function)
    assert after != before
    (tmp_path / "bystander.py").write_text("A = 2\n")
    assert _source(function) == after
    assert not Path("ran").exists() and "helper" not in sys.modules


def test_the_source_of_an_installed_function_is_found_without_importing_it(tmp_path, monkeypatch):
    write(tmp_path, {"bought/__init__": "raise RuntimeError\n", "bought/part": "def score(p, r, m): pass\n"})
    monkeypatch.syspath_prepend(tmp_path)
    files = Function(target="bought.part:score").source_files()
    assert files == [tmp_path / "bought" / "part.py", tmp_path / "bought" / "__init__.py"]
    assert Function(target="builtins:max").source_files() == []
    with pytest.raises(InputError, match=r"bought.part does not load: RuntimeError"):
        Function(target="bought.part:score").adapted()
