"""What a row holds is used, refused by name, or counted and named: the same rows through every reader."""

from __future__ import annotations

import json
import shlex
from collections import Counter

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from alignkit.check import data as check_data
from alignkit.check import lints
from alignkit.core.errors import InputError
from alignkit.data import columns
from alignkit.data.dataset import Data

USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}
SYSTEM = {"role": "system", "content": "Speak of days."}
SFT = {"prompt": "Hello", "completion": "Good day."}
PAIR = {"prompt": "Hello", "chosen": "Good day.", "rejected": "Go away."}


def as_jsonl(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def as_json(folder, rows):
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def as_parquet(folder, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_saved(folder, rows):
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


WRITERS = (as_jsonl, as_json, as_parquet, as_saved)


@pytest.fixture
def read(tmp_path):
    """read(kind, *rows, **settings): the rows of a JSONL file of these."""
    return lambda kind, *rows, **settings: Data(path=str(as_jsonl(tmp_path, rows)), **settings).rows(kind)


def said(rows) -> list[str]:
    """The notes of rows, without the file's name."""
    return [note.partition(": ")[2] for note in rows.notes]


def refused(read, kind, *rows, **settings) -> str:
    with pytest.raises(InputError) as caught:
        read(kind, *rows, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("write", WRITERS)
def test_a_tool_call_is_refused_by_name_in_every_format_and_a_null_one_is_none(tmp_path, write):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    plain = {"messages": [USER, {**ANSWER, "tool_calls": None, "name": None}]}
    assert Data(path=str(write(tmp_path, [plain]))).rows("sft") == [{"prompt": [USER], "completion": "Good day."}]
    (tmp_path / "again").mkdir()
    with pytest.raises(InputError, match=r"messages\[1\]\.tool_calls' is list .*remove it"):
        Data(path=str(write(tmp_path / "again", [{"messages": [USER, call, ANSWER]}]))).rows("sft")


@pytest.mark.parametrize("name", ["tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "images"])
@pytest.mark.parametrize("kind", ["sft", "preference", "prompt"])
def test_what_a_message_says_beside_its_text_is_refused_by_name(read, kind, name):
    odd = {**USER, name: ["x"]}
    row = {"sft": {"messages": [odd, ANSWER]}, "preference": {**PAIR, "prompt": [odd]}, "prompt": {"prompt": [odd]}}
    assert f"[0].{name}' is list ['x']" in refused(read, kind, row[kind])


def test_other_fields_of_messages_are_counted_and_named_in_one_line(read):
    rows = [{"messages": [{**USER, "id": n}, {**ANSWER, "weight": 1}], "source": "x"} for n in range(3)]
    found = read("sft", *rows, {"messages": [USER, ANSWER], "source": "", "{odd}": 4})
    assert found[0] == {"prompt": [USER], "completion": "Good day."}
    assert said(found) == ["4 rows hold what is not used: source (3), messages.id (3), messages.weight (3), {odd} (1)"]
    assert "the last answer is the one trained on" in refused(
        read, "sft", {"messages": [USER, {**ANSWER, "weight": 0}]}
    )


def test_content_of_text_parts_is_their_text_and_other_parts_are_refused(read):
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day.", "image_url": None}]
    assert read("sft", {"messages": [USER, {**ANSWER, "content": parts}]})[0]["completion"] == "Good day."
    picture = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    assert "a part of type 'image_url'" in refused(read, "sft", {"messages": [{**USER, "content": picture}, ANSWER]})
    assert "'messages[1].content[0]' is str" in refused(read, "sft", {"messages": [USER, {**ANSWER, "content": ["x"]}]})


@pytest.mark.parametrize("content", ["", " \n", None])
def test_an_empty_system_message_is_no_message_and_is_counted(read, content):
    empty = {"role": "system", "content": content}
    found = read("sft", {"messages": [empty, USER, ANSWER]}, {"prompt": [empty, USER], "completion": "Good day."})
    assert found == [{"prompt": [USER], "completion": "Good day."}] * 2
    assert said(found) == ["2 empty system messages left out"]
    pair = {"chosen": [empty, USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No."}]}
    assert read("preference", pair) == [{"prompt": [USER], "chosen": "Good day.", "rejected": "No."}]
    assert "only empty system messages" in refused(read, "prompt", {"prompt": [empty]})
    assert "'prompt[0].content'" in refused(read, "prompt", {"prompt": [{**USER, "content": content}]})


# -------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("write", WRITERS)
def test_columns_that_nobody_uses_are_named_in_every_format(tmp_path, write):
    rows = Data(path=str(write(tmp_path, [{**SFT, "id": n, "score": None} for n in range(2)]))).rows("sft")
    assert rows == [SFT, SFT] and said(rows) == ["2 rows hold what is not used: id"]


def test_check_data_says_what_is_not_used_as_a_stage_does(tmp_path):
    path = str(as_jsonl(tmp_path, [{**SFT, "id": 1}]))
    data = Data(path=path)
    rows = data.rows("sft")
    assert check_data.check_set("data", data, "sft").notes == said(rows)
    assert lints.at_start("sft", {"data": (data, rows)}) == list(rows.notes)


def test_a_system_column_and_earlier_turns_stand_in_front_of_the_prompt(read):
    row = {"system": "Speak of days.", "history": [["Hi", "Yes?"]]}
    turns = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, USER]
    assert read("sft", SFT | row) == [{"prompt": turns, "completion": "Good day."}]
    assert read("preference", PAIR | row)[0]["prompt"] == turns
    assert read("preference", {"prompt": "Hello", "answers": ["a", "b"]} | row)[0]["prompt"] == turns
    assert read("prompt", {"prompt": "Hello"} | row) == [{"prompt": turns} | row], "reward functions see the columns"
    assert said(read("sft", SFT | row)) == [
        "1 rows with a column 'history', read as the turns before the prompt",
        "1 rows with a column 'system', read as the system message in front",
    ]
    mapped = read("sft", SFT | {"rules": "Speak of days."}, columns={"system": "rules"})
    assert mapped == [{"prompt": [SYSTEM, USER], "completion": "Good day."}]
    same = {"messages": [SYSTEM, USER, ANSWER], "system": "Speak of days."}
    assert read("sft", same)[0]["prompt"] == [SYSTEM, USER]
    assert "keep one of them" in refused(read, "sft", same | {"system": "Speak of nights."})
    assert "both 'system' and 'system_prompt'" in refused(read, "sft", SFT | row | {"system_prompt": "x"})
    assert "'system' is int 3" in refused(read, "sft", SFT | {"system": 3})
    assert "'history[0]' is list ['a']" in refused(read, "sft", SFT | {"history": [["a"]]})
    assert read("prompt", {"prompt": "Hello", "system": 3}) == [{"prompt": "Hello", "system": 3}]


@pytest.mark.parametrize("name", ["tools", "images", "audio"])
def test_columns_that_the_model_would_have_to_see_are_refused_where_they_say_something(read, name):
    assert f"'{name}' is list ['x']" in refused(read, "sft", SFT | {name: ["x"]})
    assert f"'{name}'" in refused(read, "preference", PAIR | {name: "x"})
    talk = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
    assert f"'{name}'" in refused(read, "prompt", talk | {name: "x"})
    for empty in ([], None, "", "[]"):
        assert read("sft", SFT | {name: empty}).notes == ()


def test_a_prompt_beside_a_conversation_is_said_where_the_conversation_does_not_say_it(read):
    talk = {"messages": [USER, ANSWER]}
    found = read("sft", talk | {"prompt": "Hello"})
    assert found == [{"prompt": [USER], "completion": "Good day."}] and found.notes == ()
    assert said(read("sft", talk | {"prompt": "Another"})) == ["1 rows hold what is not used: prompt"]
    pair = {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No."}]}
    assert read("preference", pair | {"prompt": "Hello"}).notes == ()
    assert said(read("preference", pair | {"prompt": "Another"})) == ["1 rows hold what is not used: prompt"]
    assert read("sft", talk | SFT) == [SFT], "a prompt with its completion comes first"


def test_a_prompt_row_loses_no_column(read):
    """Another `messages`, or a column that a mapped field hides: kept, or named."""
    row = {"prompt": "Hello", "messages": [USER, ANSWER], "n": 3}
    assert read("prompt", row) == [row]
    hidden = read("prompt", {"q": "Hello", "prompt": "other", "n": 3}, columns={"prompt": "q"})
    assert hidden == [{"prompt": "Hello", "n": 3}] and said(hidden) == ["1 rows hold what is not used: prompt"]
    both = read("prompt", {"messages": [USER, ANSWER], "reference": "Hi."})
    assert both == [{"prompt": [USER], "reference": "Good day."}]
    assert said(both) == ["1 rows hold what is not used: reference"]


@pytest.mark.parametrize("extra", [{"rejected": [USER]}, {"completion": [ANSWER]}, {"chosen": 3}, {"completion": {"a": 1}}, {"chosen": "a", "rejected": None}])  # fmt: skip
def test_other_columns_of_a_prompt_row_may_be_of_any_type(tmp_path, extra):
    path = as_jsonl(tmp_path, [{"prompt": f"Hello {n}"} | extra for n in range(3)])
    data = Data(path=str(path))
    rows = data.rows("prompt")
    assert rows == [{"prompt": f"Hello {n}"} | extra for n in range(3)]
    assert lints.at_start("ppo", {"data": (data, rows)}) == []
    assert check_data.check_set("data", data, "prompt").findings == {}


def test_parts_of_ranked_answers_that_nobody_uses_are_named(read):
    answers = [{"text": "a", "rating": 1, "model": "m"}, {"text": "b", "rating": 2, "model": None}]
    assert said(read("preference", {"prompt": "p", "answers": answers})) == [
        "1 rows hold what is not used: answers.model"
    ]


def test_values_of_other_types_are_refused_by_name(tmp_path):
    import datetime
    import decimal

    for value in (b"bytes", decimal.Decimal("1.5"), datetime.date(2020, 1, 2), float("nan"), True):
        folder = tmp_path / type(value).__name__
        folder.mkdir()
        with pytest.raises(InputError, match=f"'completion' is {type(value).__name__}"):
            Data(path=str(as_parquet(folder, [{"prompt": "p", "completion": value}]))).rows("sft")


# ------------------------------------------------------------------------------------------------------- proposals


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", {"prompt": "p", "prompt_id": "f0f0", "source": "x"}),
        ("sft", {"prompt": "p", "promptId": "some words", "url": "https://a.b/c d"}),
        ("sft", {"prompt": "p", "digest": "f0" * 32, "count": "17"}),
        ("preference", {"question_id": "q", "winner": "model_a", "conversation_a": [USER], "conversation_b": [USER]}),
        ("preference", {"prompt": "p", "completion": "c", "label": True}),
        ("preference", {"prompt": "p", "chosen": "c", "rejected_score": 0.5}),
        ("prompt", {"language": "English and more", "category": "open qa"}),
    ],
)
def test_no_column_is_proposed_that_cannot_be_the_field(read, kind, row):
    assert refused(read, kind, row).rpartition("+data.columns.")[2].endswith("=...")


def test_a_category_is_no_answer_and_a_sentence_is(read):
    rows = [{"prompt": f"p {n}", "verdict": ["not so good", "very good"][n % 2]} for n in range(40)]
    assert refused(read, "sft", *rows).endswith("+data.columns.completion=...")
    rows = [{"prompt": f"p {n}", "verdict": f"It is {n} days", "n": n} for n in range(40)]
    assert refused(read, "sft", *rows).endswith(": +data.columns.completion=verdict")
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1), "target": str(n % 2)} for n in range(40)]
    assert refused(read, "sft", *rows).endswith(": +data.columns.completion=answer")
    talk = {"dialog": [USER, ANSWER], "topic": "days"}
    assert refused(read, "sft", talk).endswith(": +data.columns.messages=dialog")


@pytest.mark.parametrize("name", ["Frage (neu)", "a,b", "a=b", "it's", 'say "x"', "x\\", " text", "${x}", "null", "ä"])
def test_a_proposed_override_is_read_back_as_the_column(name):
    (argument,) = shlex.split(columns.override("prompt", name))
    override = OverridesParser.create().parse_override(argument)
    assert override.key_or_group == "data.columns.prompt" and override.value().replace("\\${", "${") == name


def test_one_column_is_not_two_fields():
    for mapped in ({"prompt": "a", "completion": "a"}, {"messages": "a", "prompt": "b"}):
        with pytest.raises(InputError, match="map one of the two"):
            Data(path="x.jsonl", columns=mapped).check()


# -------------------------------------------------------------------------------------------- which layout rows have


def test_the_layout_is_that_of_most_rows_and_the_odd_ones_are_faulty(read):
    alpaca = [{"instruction": f"Say {n}.", "input": "", "output": "Yes."} for n in range(5)]
    odd = [{"instruction": "Say.", "output": 7}, SFT, {"note": "x"}]
    found = read("sft", *odd, *alpaca, faulty="leave_out")
    assert [row["prompt"] for row in found] == [f"Say {n}." for n in range(5)]
    assert said(found)[0] == "3 faulty rows left out (data.faulty=leave_out)"
    assert "line 1: 'output' is int" in refused(read, "sft", *odd, *alpaca)
    own = read("sft", alpaca[0], SFT, SFT, faulty="leave_out")
    assert own == [SFT, SFT]


def test_rows_before_an_unreadable_place_are_still_told(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,completion\n,b\na,"b\n')
    data, told = Data(path=str(tmp_path / "rows.csv")), []
    with pytest.raises(InputError, match="row 2: not CSV"):
        told.extend(row for _, row in data.stream("sft", Counter()))
    with pytest.raises(InputError, match="row 1: 'prompt' is an empty string"):
        data.rows("sft")
