"""`alignkit check data`: every planted fault is found, clean rows raise no alarm, and the report says where."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import invoke, make_work
from tiny import EOS, tiny_tokenizer

from alignkit.check import data as check_data
from alignkit.check import lints, minhash
from alignkit.check.lints import Findings, HeldOut, RowLints
from alignkit.check.token_lints import TokenLints, template_notes
from alignkit.core.errors import InputError
from alignkit.data import tokens
from alignkit.data.dataset import Data

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import check_million

PAIR = {"prompt": "How are you?", "chosen": "I am happy.", "rejected": "Sad."}


@pytest.fixture
def jsonl(tmp_path):
    """Write rows (dicts, or lines as they are) and return the path."""

    def write(*rows, name="rows.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return str(tmp_path / name)

    return write


def found(path, kind="preference", **more) -> dict[str, list[int]]:
    """{lint: the numbers of its rows}."""
    made = check_data.check_set("data", Data(path=path), kind, **more)
    return {lint: finding.listed for lint, finding in made.findings.items()}


# ----------------------------------------------------------------------------------------------------------- the lints


def test_every_kind_of_refused_row_is_found_and_the_rest_is_read(jsonl):
    path = jsonl(
        PAIR,
        b'{"prompt": "x"',
        b"",
        b"[1]",
        b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}',
        {"prompt": "x", "chosen": "a"},
        {**PAIR, "chosen": 3},
        {**PAIR, "rejected": " "},
        {**PAIR, "rejected": PAIR["chosen"]},
        {"prompt": "x", "chosen": "a", "rejected": "b"},
    )
    made = check_data.check_set("data", Data(path=path), "preference")
    listed = {lint: finding.listed for lint, finding in made.findings.items()}
    assert listed == {"unreadable": [2, 4, 5], "schema": [6, 7], "empty": [8], "same_pair": [9]}
    assert (made.rows, made.findings.refused) == (2, 7)
    assert made.findings["schema"].shown[1].startswith(f"{path} line 7: 'chosen' is int 3, expected a string")
    assert made.lengths["prompt"].tolist() == [12, 1] and made.lengths["chosen"].tolist() == [11, 1]


def test_only_the_first_ten_are_shown_and_all_are_counted(jsonl):
    rows = [{"prompt": f"p{n}", "chosen": "x", "rejected": "y" if n % 2 else "x"} for n in range(50)]
    finding = check_data.check_set("data", Data(path=jsonl(*rows)), "preference").findings["same_pair"]
    assert (finding.count, len(finding.shown)) == (25, 10) and finding.listed == list(range(1, 51, 2))


def test_duplicates_and_contradictions_name_the_first_row_like_them(jsonl):
    other = {"prompt": "How are you?", "chosen": "I am happy.", "rejected": "Awful."}
    turned = {"prompt": PAIR["prompt"], "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    path = jsonl(PAIR, other, PAIR, turned, PAIR)
    made = check_data.check_set("data", Data(path=path), "preference")
    assert made.findings["duplicate"].listed == [3, 5] and made.findings["reversed"].listed == [4]
    assert made.findings["reversed"].shown == [f"{path} line 4: the reverse of {path} line 1"]
    messages = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert found(jsonl(messages, {"prompt": "a", "completion": "b"}, messages), "sft") == {"duplicate": [3]}


BAD = {
    "encoding": [
        "caf\ufffd",
        "half \ud83d of one",
        "cafÃ© au lait",
        "donâ€™t",
        "Ã¼ber",
        "ðŸ˜€ ha",
        "â€œso",
        "ï»¿start",
        "Â£3",
    ],
    "control": ["nul \x00", "bell \x07", "\x1b[31mred", "\x7f", "next\x85line", "\ufeffstart", "turn \u202e back"],
}
GOOD = [
    *check_million.ODD,
    *("tab\tand\nnew line\r\n", "«Português»: AMANHÃ", "“MAÇÃ”", "Â", "Ãlvaro", "a\u200bb", "e\u0301", "שלום", "𝒳", "naïve €5"),
]  # fmt: skip


@pytest.mark.parametrize(("lint", "text"), [(lint, text) for lint, texts in BAD.items() for text in texts])
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_faulty_text_is_found_in_every_field(lint, text, field):
    findings = Findings()
    RowLints().check([("x.jsonl line 4", {**PAIR, field: text})], findings)
    assert {name: finding.listed for name, finding in findings.items()} == {lint: [4]}
    assert findings[lint].shown[0].isascii() and "\n" not in findings[lint].shown[0]


@pytest.mark.parametrize("text", GOOD)
def test_text_of_any_language_is_no_fault(text):
    findings = Findings()
    RowLints().check([("x.jsonl line 4", {**PAIR, "prompt": text})], findings)
    assert findings == {}


def test_answers_alike_but_for_case_and_space(jsonl):
    path = jsonl(
        {**PAIR, "chosen": "Yes,  I do.", "rejected": "yes, I do.\n"}, {**PAIR, "chosen": "Yes.", "rejected": "Yes"}
    )
    assert found(path) == {"alike_pair": [1]}


def test_held_out_prompts_are_compared_without_case_space_and_system_messages():
    def chat(text):
        return [{"role": "system", "content": "Be brief." * 30}, {"role": "user", "content": text}]

    held, findings = HeldOut(), Findings()
    long = "the quick brown fox jumps over the lazy dog while seven wizards box with a jovial queen, "
    long += "and nobody in the whole town could say afterwards who had begun it or why it went on until noon"
    held.add([("h.jsonl line 1", {"prompt": "Hello  There"}), ("h.jsonl line 2", {"prompt": chat(long)})])
    rows = ["hello there", chat(long.upper()), long.replace("lazy", "lazier"), chat("another thing"), "Hello here"]
    held.check([(f"t.jsonl line {n}", {"prompt": prompt}) for n, prompt in enumerate(rows, 1)], findings)
    assert {lint: finding.listed for lint, finding in findings.items()} == {"leak": [1, 2], "near_leak": [3]}
    assert "held out at h.jsonl line 1" in findings["leak"].shown[0]
    assert "% the same as h.jsonl line 2" in findings["near_leak"].shown[0]


def test_the_share_of_longer_chosen_answers_leaves_ties_out(jsonl):
    rows = [{"prompt": f"p{n}", "chosen": "a" * n, "rejected": "b" * 5} for n in range(1, 101)]
    made = check_data.check_set("data", Data(path=jsonl(*rows)), "preference")
    assert made.chosen_longer == 95 / 99  # 4 shorter, 1 equal, 95 longer
    assert any("longer one in 96%" in note for note in made.notes)


# ---------------------------------------------------------------------------------------------------- near-duplicates


def brute_shingles(text: str) -> set[bytes]:
    data = text.encode().ljust(minhash.WIDTH, b"\0")
    return {data[i : i + minhash.WIDTH] for i in range(len(data) - minhash.WIDTH + 1)}


def test_shingles_and_jaccard_are_those_of_a_brute_force_count():
    draw = random.Random(3)
    words = check_million.vocabulary(draw)
    texts = [check_million.text(draw, words, 1, 30) for _ in range(60)] + ["a", "ab", "x" * 11, "x" * 12, "日本語"]
    hashes, starts = minhash.shingles(texts)
    parts = [np.unique(part) for part in np.split(hashes, starts[1:-1])]
    sets = [brute_shingles(text) for text in texts]
    assert [len(part) for part in parts] == [len(s) for s in sets]
    for one in range(0, 60, 7):
        other = check_million.nearly(draw, words, texts[one])
        exact = len(sets[one] & brute_shingles(other)) / len(sets[one] | brute_shingles(other))
        assert minhash.jaccard(parts[one], np.unique(minhash.shingles([other])[0])) == exact


def test_the_index_finds_what_a_comparison_of_all_pairs_finds():
    draw = random.Random(5)
    words = check_million.vocabulary(draw)
    held = [check_million.text(draw, words, 15, 60) for _ in range(150)]
    others = [check_million.nearly(draw, words, text) for text in held]
    others += [check_million.text(draw, words, 15, 60) for _ in range(150)]
    sets = [brute_shingles(text) for text in held]
    expected = {}
    for number, text in enumerate(others):
        mine = brute_shingles(text)
        best = max(range(len(held)), key=lambda i: len(mine & sets[i]) / len(mine | sets[i]))
        similarity = len(mine & sets[best]) / len(mine | sets[best])
        if similarity >= minhash.THRESHOLD:
            expected[number] = (best, similarity)
    index = minhash.NearIndex()
    index.add(held[:70])
    index.add(held[70:])
    result = {number: (owner, similarity) for number, owner, similarity in index.near(others)}
    assert len(expected) > 90 and result.items() <= expected.items()  # nothing that is not so
    assert len(result) >= 0.97 * len(expected)  # at a similarity of 0.8 one pair in 130 is missed
    assert index.near([]) == minhash.NearIndex().near(["x"]) == []


def test_prompts_of_one_template_are_compared_by_what_is_their_own():
    """Nine tenths of every prompt are the same instruction: whole, any two would be nearly equal."""
    draw = random.Random(11)
    words = check_million.vocabulary(draw)
    before, after = (check_million.text(draw, words, 200, 200) for _ in range(2))

    def prompts(count):
        return [f"{before} {check_million.text(draw, words, 30, 40)} {after}" for _ in range(count)]

    held = prompts(200)
    one, other = (brute_shingles(text) for text in held[:2])
    assert len(one & other) / len(one | other) > minhash.THRESHOLD
    index = minhash.NearIndex()
    index.add([*held, "short"])
    assert index.near(prompts(200)) == []
    assert index.near([before, f"{before} {after}"]) == []
    changed = [f"{text[: len(before) + 60]}{text[len(before) + 61 :]}" for text in held]  # a letter less
    assert [owner for _, owner, _ in index.near([*changed, before])] == list(range(200))


def test_minima_agree_as_often_as_the_sets_overlap():
    """Broder 1997: P(min h(A) = min h(B)) = |A and B| / |A or B|. 96 functions x 60 pairs: a deviation of 0.01."""
    draw = random.Random(9)
    words = check_million.vocabulary(draw)
    differences = []
    for _ in range(60):
        one = check_million.text(draw, words, 20, 60)
        other = " ".join(one.split()[: draw.randint(8, 18)]) + " " + check_million.text(draw, words, 5, 20)
        (a, _), (b, _) = minhash.shingles([one]), minhash.shingles([other])
        minima = [[(h * minhash._A[k] + minhash._B[k]).min() for k in range(96)] for h in (a, b)]
        exact = len(brute_shingles(one) & brute_shingles(other)) / len(brute_shingles(one) | brute_shingles(other))
        differences.append(np.mean(np.equal(*minima)) - exact)
    assert abs(np.mean(differences)) < 0.03


# ------------------------------------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return tokens.load_tokenizer(folder, light=True)


def test_lengths_are_those_of_the_trainers_columns(tokenizer):
    """Counted in batches here, encoded row by row there."""
    draw = random.Random(1)
    words = ["good", "bad", "happy", "sad", "day", "city", "film", "the", "a", "of"]
    rows = [
        {
            "prompt": " ".join(draw.choices(words, k=draw.randint(1, 40))),
            "chosen": draw.choice(words),
            "rejected": "x y z",
        }
        for _ in range(40)
    ]
    rows[3]["chosen"] += EOS
    lint, findings = TokenLints(tokenizer, 45, "max_length"), Findings()
    lint.check([(f"r line {n}", row) for n, row in enumerate(rows)], findings)
    whole = [
        max(
            len(tokens.encode_prompt(tokenizer, r["prompt"]) + tokens.encode_response(tokenizer, r[s]))
            for s in ("chosen", "rejected")
        )
        for r in rows
    ]
    assert findings["too_long"].listed == [n for n, length in enumerate(whole) if length > 45] != []
    assert lint.lengths["chosen"].tolist() == [len(tokens.encode_response(tokenizer, r["chosen"])) for r in rows]
    _, dropped = tokens.preference_dataset(rows, tokenizer, 45)
    assert dropped.too_long == findings["too_long"].count


def test_texts_that_a_tokenizer_does_not_take_as_text(tokenizer):
    rows = [
        {"prompt": "How are you?", "completion": "I am happy."},
        {"prompt": "How are you?", "completion": f"I am{EOS} happy."},
        {"prompt": "How are <pad> you?", "completion": "I am happy."},
        {"prompt": "How are you?", "completion": "I am 快乐."},
    ]
    findings = Findings()
    TokenLints(tokenizer, 512, "max_length").check([(f"r line {n}", row) for n, row in enumerate(rows)], findings)
    assert {lint: f.listed for lint, f in findings.items()} == {"special_token": [1, 2], "unknown_token": [3]}
    assert EOS in findings["special_token"].shown[0]


def test_templates_that_refuse_or_drop_messages(tokenizer, tmp_path):
    drops = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + drops
    row = {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], "completion": "Yo"}
    for template, words in ((drops, "does not contain 'Be kind.'"), (refuses, "no system")):
        tiny_tokenizer(tmp_path)
        other = tokens.load_tokenizer(tmp_path, chat_template=template, light=True)
        findings = Findings()
        TokenLints(other, 512, "max_length").check([("r line 1", row)], findings)
        assert words in findings["template"].shown[0]


def test_how_a_template_begins_and_ends_is_noted(tokenizer, tmp_path):
    assert template_notes(tokenizer) == []
    ends = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</end>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    begins = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    tiny_tokenizer(tmp_path)
    (note,) = template_notes(tokens.load_tokenizer(tmp_path, chat_template=ends, light=True))
    assert "'</end>'" in note and repr(EOS) in note
    (note,) = template_notes(tokens.load_tokenizer(tmp_path, chat_template=begins, light=True))
    assert "otherwise than the prompt" in note
    plain = tokens.load_tokenizer(tmp_path)
    plain.chat_template = None
    assert "no chat template" in template_notes(plain)[0]


def test_a_light_tokenizer_has_the_ids_of_the_whole_one_without_torch(tmp_path):
    tiny_tokenizer(tmp_path)
    code = (
        "import sys; from alignkit.data import tokens; t = tokens.load_tokenizer(sys.argv[1], light=True);"
        "print(tokens.tokenizer_hash(t), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [tokens.tokenizer_hash(tokens.load_tokenizer(tmp_path)), "False"]


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = make_work(tmp_path_factory.mktemp("check") / "work")
    tiny_tokenizer(folder / "model")
    return folder


def test_the_command_says_where_and_exits_with_2_only_for_what_a_stage_refuses(work, jsonl):
    path = jsonl(PAIR, PAIR, {"prompt": "b", "chosen": "x", "rejected": "y"})
    result = invoke("check", "data", "kind=preference", f"data.path={path}", cwd=work)
    assert (result.code, result.err) == (0, "") and f"{path} line 2: the same as {path} line 1" in result.out
    strict = invoke("check", "data", "reward", f"data.path={path}", "data.lint=strict", cwd=work)
    assert strict.code == 2 and strict.err.count("\n") == 1 and "data.lint=strict" in strict.err
    path = jsonl(PAIR, {**PAIR, "chosen": ""})
    assert invoke("check", "data", "kind=preference", f"data.path={path}", "data.faulty=leave_out", cwd=work).code == 0
    result = invoke("check", "data", "kind=preference", f"data.path={path}", cwd=work)
    assert (
        result.code == 2
        and "line 2: 'chosen' is an empty string" in result.out
        and "1 rows would be refused" in result.err
    )


def test_a_clean_set_is_clean_and_the_json_says_the_same(work, tmp_path):
    target = tmp_path / "made" / "report.json"
    for _ in range(2):  # a report may take the place of a report
        result = invoke(
            "check", "data", "sft", "data.path=answers.jsonl", "model.path=model", "--json", str(target), cwd=work
        )
        assert (result.code, result.err) == (0, "") and "no faults found" in result.out
    report = json.loads(target.read_text())
    assert (report["verdict"], report["stage"], report["kind"], report["max_length"]) == ("clean", "sft", "sft", 512)
    rows = len((work / "answers.jsonl").read_text().splitlines())
    assert report["sets"]["data"]["rows"] == rows and report["sets"]["data"]["lengths"]["unit"] == "tokens"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["kind=sft"], ["data.path is not set"]),
        (["kind=pairs", "data.path=x.jsonl"], ["kind=pairs", "preference"]),
        (["data.path=answers.jsonl"], ["no stage given", "kind=sft"]),
        (["sft", "ppo", "data.path=answers.jsonl"], ["sft, ppo given"]),
        (["pipeline"], ["pipeline given"]),
        (["sft", "data.path=answer.jsonl"], ["no such file", "answers.jsonl"]),
        (["sft", "data.pth=answers.jsonl"], ["data.pth", "data.path"]),
        (["sft", "data.path=answers.jsonl", "data.limit=few"], ["few"]),
        (["sft", "data.path=answers.jsonl", "data.lint=hard"], ["data.lint=hard", "strict"]),
        (["sft", "data.path=answers.jsonl", "--jsno", "x"], ["--jsno", "--json"]),
        (["sft", "data.path=answers.jsonl", "--json"], ["no file given"]),
        (["sft", "data.path=answers.jsonl", "--json", "answers.jsonl"], ["answers.jsonl", "is no report"]),
        (["sft", "data.path=answers.jsonl", "--against", "none.jsonl"], ["none.jsonl", "no such file"]),
        (["sft", "data.path=answers.jsonl", "model.path=runs/none"], ["model.path='runs/none'"]),
    ],
)
def test_what_the_command_refuses(work, arguments, parts):
    before = (work / "answers.jsonl").read_bytes()
    result = invoke("check", "data", *arguments, cwd=work)
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert all(part in result.err for part in parts), result.err
    assert (work / "answers.jsonl").read_bytes() == before


def test_an_unknown_check_is_refused_and_help_is_given(work):
    assert "no check 'dta'" in invoke("check", "dta", cwd=work).err
    assert "check data" in invoke("check", "--help", cwd=work).out
    assert "--against" in invoke("check", "data", "--help", cwd=work).out


def test_small_data_is_checked_within_three_seconds_without_torch(work):
    """Processor seconds, as in `test_house.seconds`: with a tokenizer and without."""
    import os

    for more in ([], ["model.path=model"]):
        arguments = ["check", "data", "sft", "data.path=answers.jsonl", *more]
        code = f"import sys; sys.argv = ['alignkit', *{arguments!r}]\nfrom alignkit.cli import entry as cli\ntry: cli.main()\nfinally: assert not {{'torch', 'vllm'}} & set(sys.modules)"
        best = float("inf")
        for _ in range(3):
            process = subprocess.Popen(
                [sys.executable, "-c", code], cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            error = process.stderr.read()
            process.stderr.close()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0, error
            best = min(best, usage.ru_utime + usage.ru_stime)
        assert best < 3


# --------------------------------------------------------------------------------------------------- planted by the hundred


def all_found(report: dict, planted: dict[str, list[int]]) -> None:
    result = check_million.compare(report, planted)
    near = result.pop("near_leak")
    for lint, numbers in result.items():
        assert numbers == {"planted": 100, "found": 100, "listed": 100, "right": 100}, (lint, numbers)
    assert set(result) == set(check_million.FAULTS)
    assert 0.95 * near["planted"] <= near["found"] <= near["planted"]
    assert near["right"] == near["listed"] == min(near["found"], lints.LISTED)


def test_planted_faults_are_all_found_and_clean_rows_raise_no_alarm(tmp_path):
    planted = check_million.make(tmp_path, 20_000)
    done = check_million.check(tmp_path)
    assert done["code"] == 2 and "would be refused" in done["stderr"]
    all_found(done["report"], planted)


@pytest.mark.slow
def test_a_million_rows_take_bounded_memory_and_show_their_progress(tmp_path):
    planted = check_million.make(tmp_path, 1_000_000)
    done = check_million.check(tmp_path)
    all_found(done["report"], planted)
    assert done["gib"] < 1.5
    assert "row/s" in done["stderr"] and "left" in done["stderr"]


# ------------------------------------------------------------------------------------------------- when a stage starts


def test_a_stage_says_cheap_findings_in_a_line_stops_where_strict_and_is_silent_on_clean_rows(work, jsonl):
    given = ["sft", "run_name=new", "model.path=model", "dry_run=true"]
    row = {"prompt": "What is it?", "completion": "A dog."}
    path = jsonl(row, row, {"prompt": "b", "completion": "caf\ufffd"})
    held = jsonl({"prompt": "what is  it?", "completion": "A cat."}, name="held.jsonl")
    result = invoke(*given, f"data.path={path}", f"eval_data.path={held}", cwd=work)
    (line,) = [line for line in result.out.splitlines() if line.startswith("sft ")]
    assert f"data.path={path}: duplicate 1, leak 2, encoding 1: see them with `alignkit check data sft" in line
    strict = invoke(*given, f"data.path={path}", "data.lint=strict", cwd=work)
    assert strict.code == 2 and strict.err.count("\n") == 1 and "data.lint=strict takes none" in strict.err
    for clean in (["data.path=answers.jsonl"], [f"data.path={path}", "data.lint=off"]):
        out = invoke(*given, *clean, cwd=work).out
        assert out.startswith("# sft\n")


def test_a_recognised_layout_is_said_when_a_stage_starts(work, jsonl):
    path = jsonl({"instruction": "Say hello.", "input": "", "output": "Hello!"})
    result = invoke("sft", "run_name=new", "model.path=model", "dry_run=true", f"data.path={path}", cwd=work)
    assert result.code == 0 and "1 rows read as alpaca" in result.out.splitlines()[0]


def test_no_rows_at_all_is_refused(jsonl):
    with pytest.raises(InputError, match="no rows"):
        check_data.check_set("data", Data(path=jsonl()), "sft")
