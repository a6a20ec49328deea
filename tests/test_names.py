"""Run names: letters of any language in one spelling, and no path that a file system would not take."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from test_cli import command, invoke, make_work, refused

from alignkit.config import names
from alignkit.core.errors import InputError


@pytest.fixture
def work(tmp_path):
    return make_work(tmp_path / "work")


@pytest.mark.parametrize(
    "name", ["007", "1e3", "null", "a/b.c-d_e=1,2", "größe", "実験/二", "опыт-2", "परीक्षण", "x" * 255]
)
def test_names_that_are_taken(name):
    names.check_run_name(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "'an empty name' is no part"), ("../up", "'..' is no part"), ("a//b", "'an empty name' is no part"),
        ("a b", "has ' '"), ("a\nb", r"has '\n'"), ("a:b", "has ':'"), ("a\u200bb", r"has '\u200b'"), ("☂", "has '☂'"),
        ("x" * 256, "256 bytes long"), ("日" * 86, "258 bytes long"),
    ],
)  # fmt: skip
def test_names_that_are_not_say_the_letter_or_the_length(name, words):
    with pytest.raises(InputError) as error:
        names.check_run_name(name)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_two_spellings_of_one_letter_are_not_two_runs():
    typed = unicodedata.normalize("NFD", "größe")
    with pytest.raises(InputError, match=r"U\+006F U\+0308.*write 'größe'"):
        names.check_run_name(typed)


def test_a_run_folder_leaves_room_for_the_longest_file_below_it(tmp_path):
    room = names.PATH - names.BELOW - len(os.fsencode(tmp_path)) - 1
    deep = Path(*["d" * 200] * (room // 201))
    fits = tmp_path / deep / ("e" * (room - len(str(deep)) - 1))
    names.check_length(fits)
    with pytest.raises(InputError, match=rf"{len(str(fits)) + 1} bytes long .* shorten run_name= or runs_dir="):
        names.check_length(fits.with_name(fits.name + "e"))


LONG = "n" * 300


@pytest.mark.parametrize(
    "words",
    [
        command("sft", f"run_name={LONG}"), command("pipeline", f"run_name={LONG}", "dry_run=true"),
        command("sft", f"run_name={LONG}", "reuse=true"), ["plan", *command("sft", f"run_name={LONG}")],
        command("sft", f"runs_dir={LONG}"), command("sft", f"run_name={'/'.join(['d' * 200] * 20)}"),
        command("sft", f"model.path={LONG}"), command("sft", f"data.path={LONG}.jsonl"),
        ["status", LONG], ["logs", LONG], ["compare", LONG], ["lineage", LONG], ["resume", LONG], ["doctor", LONG],
    ],
    ids=lambda words: " ".join(words)[:12],
)  # fmt: skip
def test_a_name_that_is_too_long_is_refused_before_anything_starts(work, words):
    refused(work, words, "bytes")


def test_the_jobs_of_a_sweep_over_long_values_have_names_that_fit(work):
    paths = ",".join(f"{'ä' * 60}{i}.jsonl" for i in range(2))
    result = invoke(*command("sft", "-m", f"data.path={paths}", "dry_run=true"), cwd=work)
    assert result.code == 2 and "no such file" in result.err and "bytes" not in result.err
    assert f"job 1: runs{os.sep}new{os.sep}1" in result.out
