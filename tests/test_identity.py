"""The ids a reward model was trained on are the ids PPO scores: from the reward stage's rows to PPO's rollouts."""

from __future__ import annotations

import json

import pytest
from tiny import SENTENCES, TEMPLATE

from alignkit.core.errors import InputError
from alignkit.data import tokens
from alignkit.stages import token_ids

ROWS = [
    {"prompt": "Why are you sad?", "chosen": "I lost my phone.", "rejected": "No."},
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}],
        "chosen": "Good day. ",
        "rejected": "What?",
    },
]


@pytest.fixture
def tokenizer(tiny):
    return tokens.load_tokenizer(tiny)


@pytest.fixture
def written(tmp_path, tokenizer):
    token_ids.write(ROWS, tokenizer, tmp_path)
    return tmp_path


def test_the_same_tokenizer_makes_the_same_ids(written, tokenizer):
    assert token_ids.check(written, tokenizer).endswith(f"({len(token_ids.TEXTS) + len(ROWS)} texts compared)")


def test_what_is_recorded_is_what_the_trainer_is_given(written, tokenizer):
    recorded = json.loads((written / token_ids.FILE).read_text())["texts"]
    trained, _ = tokens.preference_dataset(ROWS, tokenizer, 512)
    assert [text["ids"] for text in recorded[-len(ROWS) :]] == trained["chosen_ids"]


def another_template(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("'\\n' + message", "' ' + message")


def no_template(tokenizer):
    tokenizer.chat_template = None


def another_end(tokenizer):
    tokenizer.eos_token = "<unk>"


def a_bos_in_front(tokenizer):
    tokenizer.chat_template = "{{ '<|im_start|>' }}" + TEMPLATE


@pytest.mark.parametrize("change", [another_template, another_end, a_bos_in_front], ids=lambda f: f.__name__)
def test_another_way_to_ids_is_refused_with_the_text_and_both_ids(written, tokenizer, change):
    change(tokenizer)
    with pytest.raises(
        InputError, match=r"trained on other token ids .*\[.*\] there, \[.*\] here, .*model\.chat_template"
    ):
        token_ids.check(written, tokenizer)


def test_a_template_that_is_gone_is_refused(written, tokenizer):
    no_template(tokenizer)
    with pytest.raises(InputError, match=r"model\.chat_template"):
        token_ids.check(written, tokenizer)


def test_one_changed_id_is_found(written, tokenizer):
    recorded = json.loads((written / token_ids.FILE).read_text())
    recorded["texts"][2]["ids"][-1] += 1  # the end token
    (written / token_ids.FILE).write_text(json.dumps(recorded))
    with pytest.raises(InputError, match="two"):
        token_ids.check(written, tokenizer)


def test_a_reward_model_of_elsewhere_has_no_record(tmp_path, tokenizer):
    assert "is not known" in token_ids.check(tmp_path, tokenizer)


@pytest.mark.parametrize("response", [*SENTENCES, " leads with a space", "ends in a blank ", "two\n\nlines", "x"])
def test_prompt_and_response_ids_side_by_side_are_the_ids_of_the_pair(tokenizer, response):
    """The sampler's ids are kept as they are: for text the tokenizer would write so, they are the reward stage's."""
    row = {"prompt": "What did you eat?", "chosen": response, "rejected": "no"}
    trained = tokens.preference_dataset([row], tokenizer, 512)[0]["chosen_ids"][0]
    rollouts = token_ids.as_rollouts([{"prompt": row["prompt"], "response": response}], tokenizer)
    ids, mask, starts = rollouts.flush_left()
    assert ids[0][mask[0]].tolist() == trained and trained[-1] == tokenizer.eos_token_id
    prompt = tokens.encode_prompt(tokenizer, row["prompt"])
    assert int(starts[0]) == len(prompt) and trained[: len(prompt)] == prompt
    assert token_ids.same_ids(rollouts, tokenizer) == (1, 1)


def test_ids_that_spell_a_text_in_another_way_are_counted(tokenizer):
    rollouts = token_ids.as_rollouts([{"prompt": "Hello!", "response": "good"}], tokenizer)
    letters = [tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "good"]
    rollouts.response_ids = rollouts.response_ids.new_tensor([[*letters, tokenizer.eos_token_id]])
    rollouts.response_mask = rollouts.response_ids.new_ones(1, 5).bool()
    assert token_ids.same_ids(rollouts, tokenizer) == (0, 1)
