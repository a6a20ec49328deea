"""`alignkit check data` on generated preference rows with planted faults: are all found, and nothing else?

    python scripts/check_million.py [--rows 1000000] [--folder FOLDER] [--model MODEL]

Writes rows and held-out prompts, runs the command in a process of its own, compares its report with what was planted,
and ends with one JSON line: peak memory, seconds, rows a second, and found against planted of every lint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

EACH = 100  # rows planted of every fault
FAULTS = (
    *("unreadable", "schema", "empty", "same_pair", "alike_pair", "duplicate", "reversed", "leak", "encoding"),
    "control",
)
# Clean text that a careless lint would call faulty: accents, other scripts, emoji, typographic quotes.
ODD = (
    *("café", "naïve", "Ångström", "señor", "MAÇÃ”", "SÃO", "«Âge»", "Größe", "日本語の文章", "Москва", "مرحبا", "ไทย"),
    *("👩\u200d🔬", "🏳️\u200d🌈", "“quoted”", "it’s", "10\u00a0km", "…", "a\tb", "1–2", "x²", "½", "±5", "©", "£3"),
)
PREAMBLE = "Please read the question below with care and give the best short answer that you can:"
WRONGLY_READ = ("cafÃ©", "donâ€™t", "\ufffd", "\ud83d", "Ã¼ber", "ðŸ˜€", "â€œHi")
CONTROLS = ("\x00", "\x1b[31m", "\x07", "\ufeff", "\u202e", "\x9d")


def vocabulary(draw: random.Random) -> list[str]:
    """Three thousand words of two to ten letters."""
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    return ["".join(draw.choices(letters, range(26, 0, -1), k=draw.randint(2, 10))) for _ in range(3000)]


def text(draw: random.Random, words: list[str], low: int, high: int) -> str:
    """Words, one of them odd now and then."""
    found = draw.choices(words, k=draw.randint(low, high))
    if draw.random() < 0.2:
        found[draw.randrange(len(found))] = draw.choice(ODD)
    return " ".join(found)


def nearly(draw: random.Random, words: list[str], prompt: str) -> str:
    """The prompt with one word replaced, left out, doubled or misspelt, or in another case with a mark more."""
    found = prompt.split(" ")
    place = draw.randrange(len(found))
    way = draw.randrange(5)
    if way == 0:
        found[place] = draw.choice([word for word in words if word != found[place]])
    elif way == 1:
        del found[place]
    elif way == 2:
        found.insert(place, found[place])
    elif way == 3:
        found[place] = found[place][:-1] + ("x" if found[place][-1] != "x" else "y")
    else:
        found = [word.upper() for word in found]
        found[place] += "  !"
    return " ".join(found)


def held_out(draw: random.Random, words: list[str], count: int) -> list[str]:
    """Prompts of thirty words and more: a word in fewer is more than a near-duplicate may differ by."""
    return [text(draw, words, 30, 80) for _ in range(count)]


def lines(rows: int, held: list[str], seed: int, planted: dict[str, list[int]]) -> Iterator[str]:
    """Preference rows as JSON lines; `planted` is told the numbers of the faulty ones."""
    draw = random.Random(seed)
    words = vocabulary(random.Random(0))
    near = rows // 100
    kinds = ["near_leak"] * near + [fault for fault in FAULTS for _ in range(EACH)]
    at = dict(zip(draw.sample(range(10, rows), len(kinds)), kinds, strict=True))
    earlier: dict = {}
    for number in range(rows):
        row = {name: text(draw, words, *size) for name, size in SIZES.items()}
        if draw.random() < 0.2:
            row["prompt"] = f"{PREAMBLE} {row['prompt']}"
        kind = at.get(number)
        if kind:
            planted.setdefault(kind, []).append(number + 1)
            yield faulty(kind, row, earlier, held, draw, words)
        else:
            if number % 997 == 0:
                earlier = row
            yield json.dumps(row, ensure_ascii=number % 2 == 0)


SIZES = {"prompt": (8, 60), "chosen": (5, 40), "rejected": (5, 40)}


def faulty(kind: str, row: dict, earlier: dict, held: list[str], draw: random.Random, words: list[str]) -> str:
    """A line with one fault."""
    side = draw.choice(["chosen", "rejected"])
    if kind == "unreadable":
        return draw.choice([json.dumps(row)[:-2], "[1, 2]", "null", json.dumps(row).replace('"', "'")])
    if kind == "schema":
        row = draw.choice([{**row, side: 7}, {k: v for k, v in row.items() if k != side}, {**row, "prompt": None}])
    elif kind == "empty":
        row[draw.choice(["prompt", side])] = draw.choice(["", "  ", "\n"])
    elif kind == "same_pair":
        row["chosen"] = row["rejected"]
    elif kind == "alike_pair":
        row["chosen"] = draw.choice([row["rejected"] + " ", row["rejected"].upper(), f"\n{row['rejected']}"])
    elif kind == "duplicate":
        row = earlier
    elif kind == "reversed":
        row = {**earlier, "chosen": earlier["rejected"], "rejected": earlier["chosen"]}
    elif kind == "leak":
        row["prompt"] = draw.choice(held)
    elif kind == "near_leak":
        row["prompt"] = nearly(draw, words, draw.choice(held))
    else:
        row[draw.choice(["prompt", side])] += " " + draw.choice(WRONGLY_READ if kind == "encoding" else CONTROLS)
    return json.dumps(row)


def make(folder: Path, rows: int, seed: int = 0) -> dict[str, list[int]]:
    """Write `pairs.jsonl` and `held_out.jsonl`; returns {fault: its line numbers}."""
    held = held_out(random.Random(seed + 1), vocabulary(random.Random(0)), max(100, rows // 100))
    planted: dict[str, list[int]] = {}
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines(rows, held, seed, planted))
    with (folder / "held_out.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in held)
    return planted


def check(folder: Path, *more: str) -> dict:
    """Run the command on what `make` wrote: {"report", "stderr", "code", "seconds", "gib"}."""
    command = [
        *(sys.executable, "-m", "alignkit", "check", "data", "kind=preference", f"data.path={folder / 'pairs.jsonl'}"),
        *("--against", str(folder / "held_out.jsonl"), "--json", str(folder / "report.json"), *more),
    ]
    started = time.monotonic()
    with (folder / "stderr").open("w") as errors, (folder / "stdout").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "report": json.loads((folder / "report.json").read_text()),
        "stderr": (folder / "stderr").read_text(),
        "code": process.returncode,
        "seconds": time.monotonic() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "gib": usage.ru_maxrss / 2**20,
    }


def compare(report: dict, planted: dict[str, list[int]]) -> dict[str, dict]:
    """{lint: planted, found, and of those listed how many are right}; a lint that was not planted counts too."""
    findings = report["sets"]["data"]["findings"]
    result = {}
    for lint in {*planted, *findings}:
        rows, found = set(planted.get(lint, [])), findings.get(lint, {"count": 0, "rows": []})
        right = len(rows & set(found["rows"]))
        result[lint] = {"planted": len(rows), "found": found["count"], "listed": len(found["rows"]), "right": right}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go; a temporary folder by default")
    parser.add_argument("--model", default=None, help="also check lengths under this model's tokenizer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        planted = make(folder, options.rows)
        done = check(folder, *([f"model.path={options.model}"] if options.model else []))
        result = compare(done["report"], planted)
        for lint, numbers in sorted(result.items()):
            print(f"{lint:<14} {numbers}")
        print(done["stderr"])
        size = (folder / "pairs.jsonl").stat().st_size / 2**20
    speed = options.rows / done["seconds"]
    facts = {
        "rows": options.rows,
        "mib": round(size),
        "seconds": round(done["seconds"], 1),
        "rows_per_second": round(speed),
    }
    print(
        json.dumps(
            {**facts, "cpu_seconds": round(done["cpu_seconds"], 1), "peak_gib": round(done["gib"], 3), "lints": result}
        )
    )


if __name__ == "__main__":
    main()
