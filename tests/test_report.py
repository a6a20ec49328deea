"""The report of a run: exact numbers in, the same numbers out, nothing invented, and model text kept harmless."""

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from alignkit.report import summary as report
from alignkit.report.html import write_html
from alignkit.report.summary import RunFolder, print_summary, summarize, write_summary

ANSWERS = [
    ("Hey, how was your weekend?", "It was okay, i had to work.", "It was great! I love a good weekend with friends."),
    (
        "What do you do for fun?",
        "I play some games and sleep a lot",
        "I love playing games with my friends, so much fun!",
    ),
    ("I lost my keys this morning.", "oh no that sucks", "Oh no! I hope you find them, I am happy to help."),
    ("Do you like your job?", "Not really, it is boring most days.", "Yes, I love it! The people are wonderful."),
]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def fake_run(run, ppo_steps=24, prompts=14):
    """A run folder with the files a real pipeline writes."""
    rng = random.Random(0)
    seconds = {"sft": 161.2, "sample": 74.9, "reward": 95.4, "ppo": 402.7, "evaluate": 58.1}
    metrics = {
        "sft": {"eval_loss": 3.021},
        "sample": {"pairs": 480, "prompts": 512},
        "reward": {"eval_accuracy": 0.716, "eval_accuracy_p": 2.4e-6, "eval_pairs": 120},
        "ppo": {"objective/score": 1.61},
        "evaluate": {},
    }
    for stage, took in seconds.items():
        manifest = {
            "stage": stage,
            "status": "done",
            "seconds": took,
            "metrics": metrics[stage],
            "seed": 7,
            "versions": {"torch": "2.13.0+cpu", "trl": "1.16.0"},
            "base_model": {"path": "demo:smollm2-135m", "hash": "ab12"},
        }
        write(run / stage / "manifest.json", json.dumps(manifest))
        write(run / stage / "config.yaml", "seed: 7\n")
    sft = [{"step": i, "policy/loss": 2.9 + 1.1 * math.exp(-i / 15) + rng.gauss(0, 0.05)} for i in range(1, 61)]
    write(run / "sft" / "metrics.jsonl", lines([*sft, {"step": 60, "eval_loss": 3.021}]))
    reward = [{"step": i, "loss": 0.69 - 0.004 * i + rng.gauss(0, 0.03), "accuracy": 0.6} for i in range(1, 41)]
    write(run / "reward" / "metrics.jsonl", lines(reward))
    ppo = [
        {
            "step": i,
            "objective/score": 1.7 * (1 - math.exp(-i / 9)) + rng.gauss(0, 0.08),
            "objective/kl": 4.2 * (1 - math.exp(-i / 14)) + abs(rng.gauss(0, 0.05)) * (i > 0),
            "policy/loss": rng.gauss(0, 0.02),
            "critic/loss": 0.6 * math.exp(-i / 8) + 0.05 + abs(rng.gauss(0, 0.02)),
            "rollout/length": 19 + 0.1 * i,
            "rollout/logprob_gap": 1e-4 * (1 + rng.random()),
        }
        for i in range(ppo_steps)
    ]
    write(run / "ppo" / "metrics.jsonl", lines(ppo))
    (run / "ppo" / "model").mkdir()
    results = {
        "reward": "vader",
        "prompts": 128,
        "reference": "sft",
        "policies": {
            "base": {"mean": 0.412, "ci_low": 0.35, "ci_high": 0.474, "kl": 31.2, "length": 27.9, "finished": 0.41},
            "sft": {"mean": 0.183, "ci_low": 0.121, "ci_high": 0.246, "kl": 0.0, "length": 12.4, "finished": 0.98},
            "ppo": {"mean": 0.604, "ci_low": 0.551, "ci_high": 0.655, "kl": 3.87, "length": 14.1, "finished": 0.97},
        },
        "differences": {"ppo_minus_sft": {"mean": 0.421, "ci_low": 0.342, "ci_high": 0.498}},
    }
    write(run / "evaluate" / "results.json", json.dumps(results))
    samples = []
    for policy, answer in (("base", 2), ("sft", 1), ("ppo", 2)):
        for index in reversed(range(prompts)):  # the order of the file is not the order of the prompts
            prompt, response = ANSWERS[index % 4][0], ANSWERS[index % 4][answer]
            row = {"prompt_index": index, "prompt": [{"role": "user", "content": f"{prompt} ({index})"}]}
            row |= {"policy": policy, "response": response, "score": 0.25 * answer, "finished": index != 1, "kl": 1.0}
            samples.append(row)
    write(run / "evaluate" / "samples.jsonl", lines(samples))
    return run


@pytest.fixture
def run(tmp_path):
    return fake_run(tmp_path / "runs" / "quickstart")


class Page(HTMLParser):
    """Tags in order, text, links; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "path", "use", "rect", "circle"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.links = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def printed(run, **options):
    console = Console(record=True, width=110, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(run, console, **options)
    return console.export_text()


def test_importing_it_loads_nothing_heavy():
    code = "import alignkit.report.summary, sys; print([m for m in ('torch', 'matplotlib', 'rich', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# ------------------------------------------------------------------------------------------ summary.json


def test_summary_carries_the_numbers_as_they_were_measured(run):
    path = write_summary(run)
    summary = json.loads(path.read_text())
    assert path == run / "summary.json" and not list(run.glob(".*tmp"))
    assert summary["stages"]["ppo"] == {"seconds": 402.7, "status": "done"}
    assert list(summary["stages"]) == ["sft", "sample", "reward", "ppo", "evaluate"]
    assert summary["gold"]["base"] == {"mean": 0.412, "ci_low": 0.35, "ci_high": 0.474}
    assert summary["gold"]["ppo_minus_sft"] == {"mean": 0.421, "ci_low": 0.342, "ci_high": 0.498}
    assert (summary["gold"]["reward"], summary["gold"]["prompts"]) == ("vader", 128)
    assert summary["kl"] == {"per_response": 3.87}
    assert summary["reward_model"] == {"accuracy": 0.716, "p_value": 2.4e-6, "pairs": 120.0}
    assert (summary["seed"], summary["model"]) == (7, "demo:smollm2-135m")
    assert summary["versions"] == {"torch": "2.13.0+cpu", "trl": "1.16.0"}


def test_what_is_absent_is_none_and_never_invented(tmp_path):
    summary = summarize(tmp_path / "nothing")
    nothing = {"mean": None, "ci_low": None, "ci_high": None}
    assert summary["stages"] == {s: {"seconds": None, "status": None} for s in report.STAGES}
    assert [summary["gold"][name] for name in ("base", "sft", "ppo", "ppo_minus_sft")] == [nothing] * 4
    assert summary["kl"]["per_response"] is None and summary["reward_model"]["accuracy"] is None
    assert summary["seed"] is None and summary["model"] is None and summary["versions"] is None


def test_summary_is_valid_json_even_where_a_number_is_not_finite(run):
    results = json.loads((run / "evaluate" / "results.json").read_text())
    results["policies"]["ppo"]["kl"] = "nan"
    write(run / "evaluate" / "results.json", json.dumps(results))
    assert json.loads(write_summary(run).read_text(), parse_constant=pytest.fail)["kl"]["per_response"] == "nan"
    assert "nan" in printed(run) and write_html(run).exists()


def test_a_failed_write_keeps_the_old_summary(run, monkeypatch):
    write_summary(run)
    before = (run / "summary.json").read_text()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_summary(run)
    assert (run / "summary.json").read_text() == before and not list(run.glob(".*tmp"))


# ------------------------------------------------------------------------------------------ the terminal


def test_the_table_says_it_all(run):
    text = printed(run, next_commands=["alignkit ppo run_name=x  # more of it"])
    assert max(len(line) for line in text.splitlines() if str(run) not in line) <= 110
    for pattern in (
        r"sft +done +2:41 +held-out loss 3\.02",
        r"sample +done +1:15 +480 preference pairs from 512 prompts",
        r"reward +done +1:35 +held-out pair accuracy 0\.716 \(120 pairs, p 2\.4e-6\)",
        r"ppo +done +6:43 +score .* in 24 steps, KL",
        r"evaluate +done +0:58 +vader: PPO − SFT \+0\.421 \[\+0\.342, \+0\.498\]",
        r"all +13:12",
        r"policy +mean vader +95% interval +KL to sft, nats",
        r"PPO +0\.604 +\[0\.551, 0\.655\] +3\.87 +14\.1 +97%",
        r"PPO raised the gold score \(vader\) by \+0\.421 over SFT on 128 held-out prompts",
        r"quickstart/\n",
        r"ppo/model +the PPO policy",
        r"# more of it\n +alignkit ppo run_name=x\n",
    ):
        assert re.search(pattern, text), f"{pattern}\n{text}"
    assert [f"({i})" in text for i in range(6)] == [True] * 4 + [False] * 2  # the first four prompts, in their order
    assert "cut at the length limit" in text


def test_answers_stand_side_by_side(run):
    row = next(line for line in printed(run).splitlines() if "Do you like your job?" in line)
    prompt, sft, ppo = (cell.strip() for cell in row.strip("│").split("│"))
    assert (prompt, sft) == ("Do you like your job? (3)", "Not really, it is boring most days.")
    assert ppo.startswith("Yes, I love it!")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 0.2, "PPO raised"),
        (-0.2, -0.1, "PPO lowered"),
        (-0.1, 0.2, "did not change"),
        (None, None, "No comparison"),
    ],
)
def test_the_verdict_is_honest(tmp_path, low, high, words):
    difference = {"mean": 0.05, "ci_low": low, "ci_high": high}
    write(tmp_path / "evaluate" / "results.json", json.dumps({"differences": {"ppo_minus_sft": difference}}))
    assert words in report.verdict(RunFolder(tmp_path))


def test_default_next_commands_can_be_pasted(run):
    commands = report.default_next_commands(run)
    assert any("model.path=<hub id or folder>" in command for command in commands)
    assert any("ppo.steps=96 " in command for command in commands)
    slurm = (report.Path(report.__file__).parents[1] / "launch" / "slurm.py").exists()
    assert any("launcher=slurm" in command for command in commands) == slurm
    text = printed(run)
    for command in commands:
        assert command.partition("  # ")[0] in text  # whole, on one line


def test_an_unfinished_run_is_shown_as_far_as_it_came(run):
    (run / "evaluate" / "results.json").unlink()
    (run / "evaluate" / "samples.jsonl").unlink()
    (run / "ppo" / "manifest.json").write_text('{"stage": "ppo", "status": "fai')  # torn
    text = printed(run)
    assert re.search(r"ppo +not run", text) and "the evaluate stage has not finished" in text
    assert "not picked" not in text
    page = Page(write_html(run).read_text())
    assert "not run" in page.text


# ------------------------------------------------------------------------------------------ report.html


def test_the_page_is_whole_and_loads_nothing(run):
    page = Page(write_html(run).read_text(encoding="utf-8"))
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "link" not in names and "img" not in names
    assert names.count("figure") == names.count("svg") == 9
    for link in page.links:
        assert link.startswith("#") or (run / link).exists(), link
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    for words in ("+0.421", "[+0.342, +0.498]", "3.87", "Reward against KL", "demo:smollm2-135m", "torch 2.13.0+cpu"):
        assert words in page.text
    answers = [attrs for tag, attrs in page.tags if tag == "td" and "data-policy" in attrs]
    assert len(answers) == 2 * 12  # the first twelve prompts of fourteen
    assert "(11)" in page.text and "(12)" not in page.text


def test_model_text_cannot_become_markup_or_escape_codes(run):
    evil = "<script>alert(1)</script> \x1b[31m[bold]red[/bold] & \u202eabc <img src=x onerror=y>"
    row = {"prompt_index": 0, "prompt": evil, "policy": "sft", "response": evil, "score": "nan", "finished": True}
    write(run / "evaluate" / "samples.jsonl", lines([row, {**row, "policy": "ppo", "response": "$x_1$"}]))
    page = Page(write_html(run).read_text(encoding="utf-8"))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in page.text and "\u202e" not in page.text
    text = printed(run)
    assert "\x1b" not in text and "[bold]red[/bold]" in text.replace("\n", "")


def test_an_empty_folder_still_makes_a_page(tmp_path):
    page = Page(write_html(tmp_path).read_text())
    assert "svg" not in {tag for tag, _ in page.tags}
    assert page.text.count("not run") >= 8
    assert "not run" in printed(tmp_path)


def test_the_page_is_the_same_each_time(run):
    assert write_html(run).read_text() == write_html(run).read_text()


def test_a_step_logged_twice_by_a_resumed_run_counts_once(run):
    write(
        run / "ppo" / "metrics.jsonl", lines([{"step": s, "objective/score": v} for s, v in ((1, 1), (2, 2), (2, 5))])
    )
    assert RunFolder(run).series("ppo", "objective/score") == [(1, 1.0), (2, 5.0)]


def test_losses_are_found_under_our_names_and_trls(run):
    assert len(RunFolder(run).series("sft", *report.SFT_LOSS)) == 60  # "policy/loss"
    assert len(RunFolder(run).series("reward", *report.REWARD_LOSS)) == 40  # "loss"


def test_a_conversation_keeps_its_roles_and_a_single_turn_needs_none():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert report.prompt_text(turns) == "user: hi\nassistant: hello"
    assert report.prompt_text(turns[:1]) == "hi" and report.prompt_text("hi") == "hi" and report.prompt_text(None) == ""
