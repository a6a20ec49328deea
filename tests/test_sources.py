"""A data set as it lies on disk: files, folders and patterns of shards, splits, and what stands beside them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from alignkit.check import data
from alignkit.core.errors import InputError
from alignkit.data.dataset import Data
from alignkit.data.files import read_file


@pytest.fixture
def folder(tmp_path):
    """Write shards, {name: number of rows}, and return the folder; a row says its file and number."""

    def shards(sizes: dict[str, int]):
        for name, size in sizes.items():
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"prompt": f"{name} {n}", "completion": "Good."} for n in range(1, size + 1)]
            if name.endswith(".parquet"):
                import pyarrow
                import pyarrow.parquet

                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            elif name.endswith(".jsonl"):
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            else:
                path.write_text("no rows")
        return tmp_path / "set"

    return shards


def prompts(path, **settings) -> list[str]:
    return [row["prompt"] for row in Data(path=str(path), **settings).rows("sft")]


def refused(path, **settings) -> str:
    with pytest.raises(InputError) as caught:
        prompts(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_are_one_set_in_the_order_of_their_numbers(folder):
    where = folder({"part-10.jsonl": 1, "part-2.jsonl": 2, "part-1.jsonl": 0, "README.md": 1, ".hidden.jsonl": 1})
    expected = ["part-2.jsonl 1", "part-2.jsonl 2", "part-10.jsonl 1"]
    assert prompts(where) == prompts(f"{where}/part-*.jsonl") == expected
    assert prompts(where, limit=2) == expected[:2]
    rows = Data(path=str(where)).rows("sft")
    assert rows.notes == (f"data.path={where}: 3 files read as one set, part-1.jsonl first, part-10.jsonl last",)


@pytest.mark.parametrize("given", ["", "/data", "/data/train-*.parquet"])
def test_a_fetched_hub_set_is_read_by_its_split(folder, given):
    where = folder({f"data/{split}-0000{n}-of-00002.parquet": 1 for split in ("train", "test") for n in range(2)})
    (where / ".gitattributes").write_text("x")
    (where / "dataset_infos.json").write_text("{}")
    assert prompts(f"{where}{given}") == [f"data/train-0000{n}-of-00002.parquet 1" for n in range(2)]
    if "*" not in given:
        assert len(prompts(f"{where}{given}", split="test")) == 2
        assert "has test, train: choose one" in refused(f"{where}{given}", split="validation")


def test_splits_are_told_by_files_and_folders_and_refused_where_they_are_not_plain(folder):
    where = folder({"train/a.jsonl": 1, "dev/a.jsonl": 2})
    assert prompts(where) == ["train/a.jsonl 1"] and len(prompts(where, split="validation")) == 2
    assert prompts(f"{where}/*/a.jsonl") == ["train/a.jsonl 1"]
    assert len(prompts(where / "dev" / "a.jsonl")) == 2, "a file that is named is read"
    assert "no splits" in refused(where / "train" / "a.jsonl", split="test")
    folder({"more.jsonl": 1})
    assert "files of no split: more.jsonl" in refused(where)
    assert prompts(f"{where}/more.jsonl") == ["more.jsonl 1"]


def test_a_split_of_its_own_name_is_asked_for_by_that(folder):
    where = folder({"train_sft-00000-of-00001.parquet": 1, "train_gen-00000-of-00001.parquet": 2})
    assert "has train_gen, train_sft: choose one" in refused(where)
    assert prompts(where, split="train_sft") == ["train_sft-00000-of-00001.parquet 1"]


def test_what_cannot_be_one_set_is_refused_with_both_names(folder):
    where = folder({"a.jsonl": 1, "b.parquet": 1})
    assert "several formats, a.jsonl and b.parquet" in refused(where)
    assert prompts(f"{where}/*.jsonl") == ["a.jsonl 1"]
    assert "no file fits the pattern" in refused(f"{where}/*.csv") and "a.jsonl" in refused(f"{where}/*.csv")
    assert "there is no folder" in refused(f"{where}/none/*.jsonl")


def test_a_missing_shard_is_missed(folder):
    where = folder({"train-00000-of-00003.jsonl": 1, "train-00002-of-00003.jsonl": 1})
    assert "train-00001-of-00003 is missing, 1 of 3" in refused(where)
    assert len(prompts(f"{where}/train-*")) == 2


def test_other_files_are_named_and_a_run_is_no_data_set(folder):
    where = folder({"a.jsonl": 1, "notes.txt": 1, "LICENSE": 1})
    assert Data(path=str(where)).rows("sft").notes[0].endswith("1 files in the folder are passed over: notes.txt")
    (where / "manifest.json").write_text("{}")
    (where / "config.yaml").write_text("")
    assert "a run's folder" in refused(where) and "a.jsonl" in refused(where)


def test_rows_are_placed_in_their_shard(folder):
    where = folder({"part-1.jsonl": 2, "part-2.jsonl": 2})
    (where / "part-2.jsonl").write_text('{"prompt": "part-1.jsonl 2", "completion": "Good."}\n{"prompt": "x"}\n')
    assert f"{where}/part-2.jsonl line 2: no field 'completion'" in refused(where)
    made = data.check_set("data", Data(path=str(where)), "sft")
    first, second = f"{where}/part-1.jsonl", f"{where}/part-2.jsonl"
    assert made.findings["duplicate"].shown == [f"{second} line 1: the same as {first} line 2"]
    assert made.findings["schema"].shown[0].startswith(f"{second} line 2: ")


def test_a_pack_is_refused_with_the_command_that_opens_it(folder):
    where = folder({"a.jsonl.gz": 1})
    assert f"gunzip -k {where}/a.jsonl.gz" in refused(where)


# ------------------------------------------------------------------------------------------------------- the files


TWICE = [
    ("x.jsonl", '{"prompt": "a", "prompt": "b", "completion": "c"}\n', "line 1: 'prompt' stands twice"),
    ("x.jsonl", '{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "'content' stands twice"),
    ("x.json", '[{"prompt": "a", "completion": "c", "completion": "d"}]', "'completion' stands twice"),
    ("x.csv", "prompt,completion,prompt\na,b,c\n", "2 columns are called 'prompt'"),
    ("x.csv", ",prompt,completion\n0,a,b\n", "column 1 of 3 has no name"),
    ("x.csv", "prompt;completion\na;b\n", "divided by semicolons, expected commas"),
    ("x.csv", "prompt\tcompletion, all\na\tb\n", "divided by tabs|columns"),
    ("x.csv", "prompt|completion|id\na|b|c\n", "divided by bars"),
    ("x.tsv", "prompt,completion\na,b\n", "divided by commas, expected tabs"),
    ("x.json", '{"data": [{"prompt": "a"}]}', "write the list under 'data' to a file of its own"),
    ("x.json", "[" * 100_000, "not JSON that can be read"),
    ("x.jsonl", '{"prompt": "a", "completion": "b"} {"prompt": "c"}\n', "Extra data"),
]


@pytest.mark.parametrize(("name", "text", "words"), TWICE)
def test_nothing_hides_behind_a_name_or_a_delimiter(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    message = refused(tmp_path / name)
    assert any(word in message for word in words.split("|")) and "+data.columns" not in message, message


def test_columns_of_one_name_are_refused_in_parquet_too(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert "2 columns are called 'prompt'" in refused(tmp_path / "x.parquet")


def test_long_texts_tabs_blank_lines_and_other_suffixes_are_read(tmp_path):
    long = "good day " * 20_000
    (tmp_path / "x.csv").write_text(f'prompt,completion\r\n\r\n"a; b","{long}"\r\n')
    assert Data(path=str(tmp_path / "x.csv")).rows("sft") == [{"prompt": "a; b", "completion": long}]
    (tmp_path / "x.tsv").write_text('prompt\tcompletion\na, b\t"c\td"\n')
    assert Data(path=str(tmp_path / "x.tsv")).rows("sft") == [{"prompt": "a, b", "completion": "c\td"}]
    (tmp_path / "x.ndjson").write_text('{"prompt": "a", "completion": "b\\u0000"}')
    assert [row for _, row in read_file(tmp_path / "x.ndjson")] == [{"prompt": "a", "completion": "b\0"}]
    (tmp_path / "X.JSONL").write_text('\n{"prompt": "a", "completion": "b"}')
    assert [where.rpartition(" ")[2] for where, _ in Data(path=str(tmp_path / "X.JSONL")).stream("sft", Counter())] == [
        "2"
    ]
