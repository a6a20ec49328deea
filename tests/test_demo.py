"""The quickstart's packaged parts: dialogues without a leak between the splits, and a model that speaks."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from alignkit.core.errors import InputError, RunError
from alignkit.data import demo, tokens
from alignkit.data.dataset import Data


@pytest.fixture(scope="module")
def splits():
    return {split: demo.dialogues(split) for split in demo.SPLITS}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The real conversion, about 25 seconds."""
    return demo.model(cache=tmp_path_factory.mktemp("cache"))


def opening(row) -> str:
    return row["prompt"][0]["content"]


# ------------------------------------------------------------------------------------------------------- dialogues


def test_no_prompt_is_in_two_splits_nor_twice_in_one(splits):
    for normalised in (
        opening,
        lambda row: demo._normalised(opening(row)),
        lambda row: opening(row).lower().strip(" .!?"),
    ):
        seen = [normalised(row) for rows in splits.values() for row in rows]
        assert len(seen) == len(set(seen))


def test_greeting_case_punctuation_and_contractions_do_not_make_a_prompt_new():
    assert demo._normalised("Hey there! What's your name?") == demo._normalised("hello, what is your name")
    assert demo._normalised("I'm happy.") == demo._normalised("Hi. i am HAPPY!!")
    assert demo._normalised("I am sad.") != demo._normalised("I am happy.")


def test_a_conversation_goes_to_one_split_whatever_else_the_package_holds(tmp_path, monkeypatch):
    """The split is a function of the conversation's id: order and company do not move it."""
    conversations = json.loads(demo._package_file("chitchat_dataset", "dataset.json").read_text())
    names = sorted(conversations, reverse=True)
    fewer = {name: conversations[name] for name in names[::2]}
    whole = {(prompt, answer): split for split, prompt, answer in demo._clean()[0]}
    try:
        (tmp_path / "dataset.json").write_text(json.dumps(fewer))
        monkeypatch.setattr(demo, "_package_file", lambda *_: tmp_path / "dataset.json")
        demo._clean.cache_clear()
        part = {(prompt, answer): split for split, prompt, answer in demo._clean()[0]}
    finally:
        demo._clean.cache_clear()
    common = [pair for pair in part if pair in whole]
    assert len(common) > 500
    assert all(part[pair] == whole[pair] for pair in common)
    assert common == [pair for pair in whole if pair in part], "and the order of those that stay is the same"


def test_sizes_and_counts(splits):
    sizes = {split: len(rows) for split, rows in splits.items()}
    total = sum(sizes.values())
    assert sizes["heldout"] >= 128 and sizes["train"] >= 600
    for split, share in demo.SPLITS.items():
        assert abs(sizes[split] / total - share) < 0.04
    counts = demo.left_out()
    assert counts["kept"] == total
    assert sum(counts.values()) == 7168, "every conversation of the package is accounted for"


def test_every_row_is_plain_english_chat_of_a_sensible_length(splits):
    for row in (row for rows in splits.values() for row in rows):
        prompt, answer = opening(row), row["completion"]
        assert [message["role"] for message in row["prompt"]] == ["user"] and row["reference"] == answer
        assert 3 <= len(prompt.split()) <= 30 and 2 <= len(answer.split()) <= 30
        for text in (prompt, answer):
            assert text.isascii() and text == " ".join(text.split()) and "http" not in text and "@" not in text
            assert not text[0].islower() and not text[-1].isalnum()


@pytest.mark.parametrize(
    "turn,expected",
    [
        (["Hello", "How are you doing today?"], "Hello. How are you doing today?"),
        (["what  do you do", "i paint...."], "What do you do? I paint..."),
        (["sooooo cool !!!", "Sooooo cool !!!", "?"], "Soo cool!"),
        (["i.e. this", "and i'm in"], "I.e. this. And I'm in."),
        ([""], ""),
    ],
)
def test_the_messages_of_a_turn_become_sentences(turn, expected):
    assert demo._tidy([{"text": text} for text in turn]) == expected


@pytest.mark.parametrize(
    "prompt,answer,reason",
    [
        ("What a nice day.", "It is, I love it.", ""),
        ("What a nice day.", "", "no answer"),
        ("Hello there.", "Hi, how are you?", "prompt too short or long"),
        ("Hey, hello again.", "I like dogs.", "prompt too short or long"),
        ("What a nice day.", "Hey!", "answer too short or long"),
        ("What a nice day.", "Yes " * 31, "answer too short or long"),
        ("See www.example.org for it.", "Yes I will.", "not plain text"),
        ("I know kim@home from school.", "Yes I will.", "not plain text"),
        ("Asdf. Sd. Sdf.", "Please stop that.", "not plain text"),
        ("It is a good, odd offer.", "Add it off the list.", ""),
        ("Is anybody there now?", "Yes, I am.", "about the chat room"),
        ("That prompt was odd.", "It was.", "about the chat room"),
        ("I hate that shitty film.", "Me too, a lot.", "unfit"),
    ],
)
def test_what_is_left_out(prompt, answer, reason):
    assert demo._fault(prompt, answer) == reason


def test_the_rows_serve_for_sft_and_as_prompts(splits):
    sft = Data("demo:chitchat/train").rows("sft")
    assert sft == [{"prompt": row["prompt"], "completion": row["completion"]} for row in splits["train"]]
    assert Data("demo:chitchat/heldout", limit=5).rows("prompt") == splits["heldout"][:5]
    with pytest.raises(InputError, match="no pairs: draw pairs with `alignkit sample`"):
        Data("demo:chitchat/preference").rows("preference")


def test_rows_are_the_callers_own(splits):
    demo.dialogues("train")[0]["prompt"][0]["content"] = "changed"
    assert demo.dialogues("train") == splits["train"]


def test_what_is_not_there_is_said_with_the_fix(monkeypatch):
    with pytest.raises(InputError, match="unknown split: expected one of train, preference, heldout"):
        demo.dialogues("test")
    with pytest.raises(InputError, match="demo model gpt: unknown: expected one of smollm2-135m-instruct"):
        demo.model("gpt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for use in (demo.model, lambda: Data("demo:chitchat/train").check()):
        with pytest.raises(InputError, match=r"not installed: pip install 'alignkit\[demo\]'"):
            use()


# ----------------------------------------------------------------------------------------------------------- model


def test_the_model_answers_and_ends(model_folder):
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tokens.load_tokenizer(model_folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id
    assert not hasattr(model.config, "quantization_config")

    prompt = tokens.encode_prompt(tokenizer, "What is the capital of France?")
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_the_folder_is_made_once_and_keeps_its_template(model_folder):
    assert sorted(path.name for path in model_folder.parent.iterdir()) == [model_folder.name], "no scratch is left"
    before = (model_folder / "model.safetensors").stat().st_mtime_ns
    assert demo.model(cache=model_folder.parent) == model_folder
    assert (model_folder / "model.safetensors").stat().st_mtime_ns == before
    assert "You are a helpful AI assistant named SmolLM" in tokens.load_tokenizer(model_folder).chat_template


def test_the_command_prints_the_folder_and_nothing_else(model_folder, monkeypatch):
    monkeypatch.setenv("ALIGNKIT_CACHE", str(model_folder.parent))
    done = subprocess.run([sys.executable, "-m", "alignkit.data.demo"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{model_folder}\n", "")


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_convert_apart", lambda gguf, folder: folder.mkdir())
    monkeypatch.delenv("ALIGNKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert demo.model().parent == tmp_path / "home" / ".cache" / "alignkit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.model().parent == tmp_path / "xdg" / "alignkit"
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "own"))
    assert demo.model().parent == tmp_path / "own"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"the cache cannot be written .*: set ALIGNKIT_CACHE to a folder"):
        demo.model(cache=tmp_path / "file" / "below")


def test_two_at_once_get_one_whole_folder(tmp_path, monkeypatch):
    both = threading.Barrier(2)

    def convert(gguf: Path, folder: Path):
        folder.mkdir()
        both.wait()  # both have begun before either ends
        (folder / "model.safetensors").write_text(threading.current_thread().name)

    monkeypatch.setattr(demo, "_convert_apart", convert)
    found = []
    threads = [threading.Thread(target=lambda: found.append(demo.model(cache=tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]
    assert [path.name for path in tmp_path.iterdir()] == [found[0].name]
    assert (found[0] / "model.safetensors").read_text() in {thread.name for thread in threads}


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    broken = tmp_path / "broken.gguf"
    broken.write_text("no GGUF")
    monkeypatch.setattr(demo, "_package_file", lambda *_: broken)
    with pytest.raises(RunError, match=r"broken\.gguf could not be converted: "):
        demo.model(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
