"""Public layouts: rows written by hand as their data sets have them, and what must come of them, written by hand."""

from __future__ import annotations

import json

import pytest

from alignkit.core.errors import InputError
from alignkit.data import layouts
from alignkit.data.dataset import Data


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(tmp_path):
    """read(kind, *rows, **settings): the rows of a JSONL file of these."""

    def rows(kind, *given, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        return Data(path=str(path), **settings).rows(kind)

    return rows


HH = {
    "chosen": "\n\nHuman: What is a stone?\n\nAssistant: A piece of rock.\n\nHuman: And sand?\n\nAssistant: Very small stones.",
    "rejected": "\n\nHuman: What is a stone?\n\nAssistant: A piece of rock.\n\nHuman: And sand?\n\nAssistant: I don't know\n\nwhat that is.",
}
HH_START = [user("What is a stone?"), assistant("A piece of rock."), user("And sand?")]

BINARISED = {
    "prompt": "Name a colour.",
    "prompt_id": "6a1f",
    "chosen": [user("Name a colour."), assistant("Blue.")],
    "rejected": [user("Name a colour."), assistant("Seven.")],
    "messages": [user("Name a colour."), assistant("Blue.")],
    "score_chosen": 8.5,
    "score_rejected": 4.0,
}


def completion(text: str, overall: float, fine: float | None) -> dict:
    made = {"model": "m", "principle": "honesty", "response": text, "critique": "...", "overall_score": overall}
    return made if fine is None else {**made, "fine-grained_score": fine}


RATED = {
    "source": "sharegpt",
    "instruction": "Name a colour.",
    "models": ["a", "b", "c"],
    "completions": [
        completion("Seven.", 10.0, 1.0),
        completion("Blue.", 8.5, 4.75),
        completion("Red, I think.", 7.0, 4.0),
    ],
    "correct_answers": ["None"],
}

TLDR = {
    "info": {"id": "t3", "post": "My cat sits on my keyboard. What can I do? \n", "title": "Cat", "subreddit": "pets", "site": None, "article": None},
    "summaries": [
        {"text": " Cat sits on keyboard; asks for advice.", "policy": "ref", "note": None},
        {"text": " I have a cat.", "policy": "sup4", "note": None},
    ],
    "choice": 0,
    "worker": "w1",
    "batch": "batch7.json",
    "split": "train",
    "extra": {"confidence": 7},
}  # fmt: skip
TLDR_PROMPT = "SUBREDDIT: r/pets\n\nTITLE: Cat\n\nPOST: My cat sits on my keyboard. What can I do?\n\nTL;DR:"

ALPACA = {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}
ALPACA_PLAIN = {"instruction": "Say hello.", "input": "", "output": "Hello!"}

DOLLY = {"instruction": "Which day?", "context": "It rained on Monday.", "response": "Monday."}
OPENORCA = {"id": "flan.1", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello."}
ORCA_START = [{"role": "system", "content": "Be brief."}, user("Hi")]

SHAREGPT = {
    "id": "x_0",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "See you."},
    ],
}
SHAREGPT_START = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello."), user("Bye")]
SHAREGPT_PAIR = {
    "conversations": [{"from": "human", "value": "Hi"}],
    "chosen": {"from": "gpt", "value": "Hello."},
    "rejected": {"from": "gpt", "value": "What?"},
}

ROWS = {
    ("hh_rlhf", "preference"): (HH, {"prompt": HH_START, "chosen": "Very small stones.", "rejected": "I don't know\n\nwhat that is."}),
    ("hh_rlhf", "sft"): (HH, {"prompt": HH_START, "completion": "Very small stones."}),
    ("hh_rlhf", "prompt"): (HH, {"prompt": HH_START}),
    ("ultrafeedback", "preference"): (BINARISED, {"prompt": [user("Name a colour.")], "chosen": "Blue.", "rejected": "Seven."}),
    ("ultrafeedback", "sft"): (BINARISED, {"prompt": [user("Name a colour.")], "completion": "Blue."}),
    ("ultrafeedback", "prompt"): (BINARISED, {"prompt": [user("Name a colour.")]}),
    ("tldr", "preference"): (TLDR, {"prompt": TLDR_PROMPT, "chosen": "Cat sits on keyboard; asks for advice.", "rejected": "I have a cat."}),
    ("tldr", "sft"): (TLDR, {"prompt": TLDR_PROMPT, "completion": "Cat sits on keyboard; asks for advice."}),
    ("tldr", "prompt"): (TLDR, {"prompt": TLDR_PROMPT}),
    ("alpaca", "sft"): (ALPACA, {"prompt": "Add the numbers.\n\n2 and 3", "completion": "5"}),
    ("alpaca", "prompt"): (ALPACA, {"prompt": "Add the numbers.\n\n2 and 3", "reference": "5"}),
    ("dolly", "sft"): (DOLLY, {"prompt": "Which day?\n\nIt rained on Monday.", "completion": "Monday."}),
    ("dolly", "prompt"): (DOLLY, {"prompt": "Which day?\n\nIt rained on Monday.", "reference": "Monday."}),
    ("openorca", "sft"): (OPENORCA, {"prompt": ORCA_START, "completion": "Hello."}),
    ("openorca", "prompt"): (OPENORCA, {"prompt": ORCA_START, "reference": "Hello.", "system": "Be brief."}),
    ("sharegpt", "sft"): (SHAREGPT, {"prompt": SHAREGPT_START, "completion": "See you."}),
    ("sharegpt", "prompt"): (SHAREGPT, {"prompt": SHAREGPT_START, "reference": "See you."}),
    ("sharegpt", "preference"): (SHAREGPT_PAIR, {"prompt": [user("Hi")], "chosen": "Hello.", "rejected": "What?"}),
}  # fmt: skip


@pytest.mark.parametrize(("preset", "kind"), ROWS)
def test_a_named_preset_reads_its_layout(read, preset, kind):
    row, expected = ROWS[preset, kind]
    assert read(kind, row, preset=preset) == [expected]


# What has our own fields is read as our own, as it was before there were presets.
OURS = {("ultrafeedback", "sft"), ("ultrafeedback", "preference"), ("ultrafeedback", "prompt")}


@pytest.mark.parametrize(("preset", "kind"), [case for case in ROWS if case not in OURS])
def test_a_layout_is_recognised_and_said(read, preset, kind):
    row, expected = ROWS[preset, kind]
    found = read(kind, row, row)
    assert found == [expected, expected]
    note, *others = found.notes
    assert "rows.jsonl: 2 rows read as " + preset in note and "data.preset=none" in note
    spare = {"tldr": "worker, batch, split, extra", "sharegpt": "id" if row is SHAREGPT else "", "openorca": "id"}
    named = spare.get(preset, "")
    assert [other.partition("not used: ")[2] for other in others if "not used" in other] == ([named] if named else [])


def test_rows_in_our_own_fields_are_read_as_before_and_what_is_left_is_named(read):
    found = read("preference", BINARISED)
    assert found == [{"prompt": [user("Name a colour.")], "chosen": "Blue.", "rejected": "Seven."}]
    assert [note.partition("not used: ")[2] for note in found.notes] == [
        "prompt_id, messages, score_chosen, score_rejected"
    ]
    assert read("sft", {"prompt": "a", "completion": "b", "instruction": "c", "input": "d", "output": "e"}) == [
        {"prompt": "a", "completion": "b"}
    ]
    mapped = read("sft", ALPACA, columns={"prompt": "instruction", "completion": "output"})
    assert mapped == [{"prompt": "Add the numbers.", "completion": "5"}]
    assert [note.partition("not used: ")[2] for note in mapped.notes] == ["input"]


def test_an_empty_input_leaves_the_instruction_alone_and_the_second_summary_may_be_the_choice(read):
    assert read("sft", ALPACA_PLAIN) == [{"prompt": "Say hello.", "completion": "Hello!"}]
    assert read("sft", {"instruction": "Say hello.", "output": "Hello!"}, preset="alpaca")[0]["prompt"] == "Say hello."
    assert read("preference", {**TLDR, "choice": 1})[0]["chosen"] == "I have a cat."
    news = {**TLDR, "info": {"post": None, "article": "It rained.", "title": "Rain"}}
    assert read("prompt", news) == [{"prompt": "Article:\nIt rained.\n\nTL;DR:"}]


def test_rated_completions_make_pairs_of_every_difference_best_first(read):
    """The fine-grained scores rank: Blue 4.75, Red 4.0, Seven 1.0, whatever the overall score says."""
    prompt = "Name a colour."
    expected = [("Blue.", "Red, I think."), ("Blue.", "Seven."), ("Red, I think.", "Seven.")]
    assert read("preference", RATED) == [{"prompt": prompt, "chosen": c, "rejected": r} for c, r in expected]
    assert read("preference", RATED, pairs="best_worst") == [
        {"prompt": prompt, "chosen": "Blue.", "rejected": "Seven."}
    ]
    assert read("sft", RATED) == [{"prompt": prompt, "completion": "Blue."}]
    assert read("prompt", RATED) == [{"prompt": prompt}]
    old = {**RATED, "completions": [completion("A", 3.0, None), completion("B", 9.0, None)]}
    assert read("preference", old) == [{"prompt": prompt, "chosen": "B", "rejected": "A"}]


def test_ranked_answers_of_our_own_make_pairs_and_ties_are_counted(read):
    texts = {"prompt": "p", "answers": ["best", "middle", "worst"]}
    pairs = [("best", "middle"), ("best", "worst"), ("middle", "worst")]
    assert read("preference", texts) == [{"prompt": "p", "chosen": c, "rejected": r} for c, r in pairs]
    rated = {
        "q": [user("p")],
        "answers": [{"text": "a", "rating": 2}, {"text": "b", "rating": 5.5}, {"text": "c", "rating": 2}, {"text": "a", "rating": -1}],
    }  # fmt: skip
    found = read("preference", rated, columns={"prompt": "q"})
    assert [(row["chosen"], row["rejected"]) for row in found] == [("b", "a"), ("b", "c"), ("b", "a"), ("c", "a")]
    assert found.notes[0].endswith("2 pairs of ranked answers left out, equal in rating or in text")
    best = read("preference", rated, columns={"prompt": "q"}, pairs="best_worst")
    assert best == [{"prompt": [user("p")], "chosen": "b", "rejected": "a"}] and best.notes == ()


REFUSED = {
    "transcripts beside a prompt": ("preference", {"prompt": "What is a stone?", **HH}, {}, ["data.preset=hh_rlhf", "data.preset=none"]),
    "two layouts": ("sft", {**ALPACA, **SHAREGPT}, {}, ["alpaca and sharegpt", "data.preset"]),
    "pairs of alpaca": ("preference", ALPACA, {}, ["one answer a prompt", "preference data"]),
    "hh: another beginning": ("preference", {**HH, "rejected": "\n\nHuman: Hi\n\nAssistant: No."}, {}, ["before their last answer", "remove"]),
    "hh: the human speaks last": ("sft", {"chosen": HH["chosen"] + "\n\nHuman: Ok", "rejected": HH["rejected"]}, {}, ["'chosen' is no transcript"]),
    "hh: no transcript": ("preference", {"chosen": "Yes.", "rejected": "No."}, {"preset": "hh_rlhf"}, ["'chosen' is no transcript"]),
    "hh: an empty answer": ("preference", {**HH, "chosen": HH["chosen"].removesuffix("Very small stones.")}, {}, ["'chosen' is an empty string"]),
    "tldr: a third choice": ("preference", {**TLDR, "choice": 2}, {}, ["choice 2", "0 or 1"]),
    "hh: a third speaker": ("preference", {name: text.replace("Human: And", "System: x\n\nHuman: And") for name, text in HH.items()}, {}, ["a turn of System"]),
    "alpaca: a number for input": ("sft", {**ALPACA, "input": 0}, {"preset": "alpaca"}, ["'input' is int"]),
    "tldr: no title": ("prompt", {**TLDR, "info": {"post": "x", "subreddit": "y"}}, {}, ["'title'", "expected str"]),
    "sharegpt: an odd sender": ("sft", {"conversations": [{"from": ["human"], "value": "x"}]}, {}, ["'conversations[0]'"]),
    "sharegpt: a tool's call": ("sft", {"conversations": [{"from": "human", "value": "x", "tool_calls": [1]}, {"from": "gpt", "value": "y"}]}, {}, ["[0].tool_calls'"]),
    "tldr: no text": ("prompt", {**TLDR, "info": {"title": "x"}}, {}, ["post or article"]),
    "sharegpt: a new sender": ("sft", {"conversations": [{"from": "alien", "value": "x"}]}, {}, ["'conversations[0]'", "human"]),
    "sharegpt: the human speaks last": ("sft", {"conversations": SHAREGPT["conversations"][:-1]}, {}, ["'messages'", "assistant's last"]),
    "ultrafeedback: no rating": ("preference", {**RATED, "completions": [{"response": "x"}]}, {}, ["completions[0]", "fine-grained_score"]),
    "ultrafeedback: N/A": ("preference", {**RATED, "completions": [{"response": "x", "overall_score": "N/A"}]}, {}, ["'N/A'", "a number"]),
    "one answer": ("preference", {"prompt": "p", "answers": ["a"]}, {}, ["'answers' has 1", "two"]),
    "an answer without a rating": ("preference", {"prompt": "p", "answers": ["a", {"text": "b"}]}, {}, ["'answers[0]'", "rating"]),
    "a rating that is none": ("preference", {"prompt": "p", "answers": [{"text": "b", "rating": float("nan")}]}, {}, ["'answers[0]'", "rating"]),
    "an empty answer": ("preference", {"prompt": "p", "answers": ["a", ""]}, {}, ["'rejected' is an empty string"]),
    "the wrong preset": ("sft", ALPACA, {"preset": "sharegpt"}, ["'conversations' is not among instruction, input, output", "data.preset"]),
    "no such preset": ("sft", ALPACA, {"preset": "alpacca"}, ["data.preset=alpacca", "did you mean alpaca?"]),
    "no such way to pair": ("preference", RATED, {"pairs": "best"}, ["data.pairs=best", "best_worst"]),
    "preset and columns": ("sft", ALPACA, {"preset": "alpaca", "columns": {"prompt": "instruction"}}, ["data.preset=alpaca", "data.columns.prompt"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(read, case):
    kind, row, settings, parts = REFUSED[case]
    with pytest.raises(InputError) as caught:
        read(kind, row, **settings)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_faulty_rows_are_left_out_only_where_that_is_asked_for_and_counted(read):
    empty = {**HH, "chosen": HH["chosen"].removesuffix("Very small stones.")}
    found = read("preference", empty, HH, {"chosen": 3, "rejected": 4}, faulty="leave_out")
    assert found == [ROWS["hh_rlhf", "preference"][1]]
    assert [note.partition("rows.jsonl: ")[2] for note in found.notes] == [
        "2 faulty rows left out (data.faulty=leave_out)",
        "1 rows read as hh_rlhf (data.preset=none reads their fields as they are)",
    ]
    with pytest.raises(InputError, match="no rows but 1 faulty"):
        read("preference", {"prompt": 3}, faulty="leave_out")


def test_every_preset_has_marks_and_a_case_for_each_kind_it_can_make():
    assert set(layouts.MARKS) == set(layouts.PRESETS) == {preset for preset, _ in ROWS}
    impossible = {(preset, "preference") for preset in ("alpaca", "dolly", "openorca")}
    assert set(ROWS) == {(p, k) for p in layouts.PRESETS for k in layouts.OWN} - impossible


TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


def test_context_columns_of_a_layout_reach_the_prompt(read):
    system = {"role": "system", "content": "Be brief."}
    row = {**ALPACA_PLAIN, "system": "Be brief.", "history": [["Hi", "Yes?"]]}
    assert read("sft", row)[0]["prompt"] == [system, user("Hi"), assistant("Yes?"), user("Say hello.")]
    assert read("prompt", row)[0]["prompt"] == [system, user("Hi"), assistant("Yes?"), user("Say hello.")]
    assert read("sft", {**row, "system": "", "history": []}) == [{"prompt": "Say hello.", "completion": "Hello!"}]
    assert read("sft", {"conversations": TALK, "system": "Be brief."})[0]["prompt"] == [system, user("Hi")]
    assert read("preference", {**SHAREGPT_PAIR, "system": "Be brief."})[0]["prompt"] == [system, user("Hi")]


@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
@pytest.mark.parametrize("turns", [TALK, [user("Hi"), assistant("Hello.")]])
def test_a_conversation_is_one_under_any_of_its_names(read, column, turns):
    turns = [{"role": None, "content": None, **turn} if "from" in turn else {"from": None, **turn} for turn in turns]
    found = read("sft", {column: turns})
    assert found == [{"prompt": [user("Hi")], "completion": "Hello."}]
    assert not any("not used" in note for note in found.notes)


def test_one_odd_first_row_does_not_decide_for_all(read):
    cut = {**HH, "chosen": "\n\nHuman: What is a stone?"}
    assert read("preference", cut, HH, HH, faulty="leave_out") == [ROWS["hh_rlhf", "preference"][1]] * 2
