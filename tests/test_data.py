"""Rows, tokens and sampling: what is accepted, how every fault is told, and that a text has the same ids everywhere."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter

import pytest
from tiny import EOS, PAD, VOCAB, WORDS, tiny_model, tiny_tokenizer

from alignkit.core.errors import InputError
from alignkit.data import dataset, tokens
from alignkit.data.dataset import Data
from alignkit.data.tokens import PromptSampler

USER = {"role": "user", "content": "How are you?"}
ANSWER = {"role": "assistant", "content": "I am happy."}
SFT = {"prompt": "How are you?", "completion": "I am happy."}
PAIR = {"prompt": "How are you?", "chosen": "Happy.", "rejected": "Sad."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return tokens.load_tokenizer(folder)


@pytest.fixture
def jsonl(tmp_path):
    """Write rows (dicts, or lines as they are) to chats.jsonl and return its path."""

    def write(*rows, name="chats.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(tmp_path / name)

    return write


def refused(path, kind="sft", **settings) -> str:
    """The message `rows` refuses with; every one is a single line."""
    with pytest.raises(InputError) as caught:
        Data(path=str(path), **settings).rows(kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ what is accepted


def test_import_is_light():
    code = (
        "import sys, time; import omegaconf; start = time.perf_counter(); import alignkit.data.dataset, alignkit.data.demo;"
        "seconds = time.perf_counter() - start;"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'trl'} & set(sys.modules);"
        "assert not heavy, heavy; assert seconds < 0.5, seconds"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_node_becomes_the_component():
    from omegaconf import OmegaConf

    node = OmegaConf.merge(OmegaConf.structured(Data), {"path": "x.csv", "columns": {"prompt": "q"}, "limit": 3})
    assert OmegaConf.to_object(node) == Data(path="x.csv", columns={"prompt": "q"}, limit=3)


def test_sft_rows_in_every_form_come_out_as_one(jsonl):
    path = jsonl(
        SFT,
        {"prompt": [USER], "completion": [ANSWER]},
        "",
        {"messages": [USER, ANSWER], "id": 7},
    )
    assert Data(path).rows("sft") == [
        SFT,
        {"prompt": [USER], "completion": "I am happy."},
        {"prompt": [USER], "completion": "I am happy."},
    ]


def test_preference_rows(jsonl):
    path = jsonl(
        PAIR,
        {"prompt": [USER], "chosen": [ANSWER], "rejected": "Sad."},
        {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "No."}]},
    )
    assert Data(path).rows("preference") == [
        PAIR,
        {"prompt": [USER], "chosen": "I am happy.", "rejected": "Sad."},
        {"prompt": [USER], "chosen": "I am happy.", "rejected": "No."},
    ]


def test_prompt_rows_keep_other_columns_and_take_a_reference(jsonl):
    path = jsonl({"q": "Hello", "reference": "Hi", "id": 7}, {"q": "Bye", "reference": None, "id": 8})
    rows = Data(path, columns={"prompt": "q"}).rows("prompt")
    assert rows == [{"prompt": "Hello", "reference": "Hi", "id": 7}, {"prompt": "Bye", "id": 8}]
    path = jsonl({"messages": [USER, ANSWER], "id": 1})
    assert Data(path).rows("prompt") == [{"prompt": [USER], "reference": "I am happy.", "id": 1}]


def test_every_file_format_gives_the_same_rows(tmp_path, jsonl):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"Say {n}, \u2028please", "answer": f"Line one\nand {n}"} for n in range(5)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "arrow")
    datasets.DatasetDict({"train": saved, "test": saved.select([4])}).save_to_disk(tmp_path / "dict")

    columns = {"prompt": "question", "completion": "answer"}
    expected = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for name in ("x.jsonl", "x.json", "x.csv", "x.parquet", "arrow", "dict"):
        assert Data(str(tmp_path / name), columns=columns).rows("sft") == expected, name
        assert Data(str(tmp_path / name), columns=columns, limit=2).rows("sft") == expected[:2], name
    assert Data(str(tmp_path / "dict"), split="test", columns=columns).rows("sft") == expected[4:]


def test_a_hub_id_goes_to_datasets_with_its_config_and_split(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((*a, k["split"])) or [SFT])
    assert Data("org/chats:english", split="test").rows("sft") == [SFT]
    assert Data("org/chats").rows("sft") == [SFT]
    assert asked == [("org/chats", "english", "test"), ("org/chats", None, "train")]


def test_limit_stops_before_a_later_fault(jsonl):
    assert Data(jsonl(SFT, "{"), limit=1).rows("sft") == [SFT]


def test_fingerprint_is_of_content_and_order():
    one, two = {"prompt": "a", "completion": "b"}, {"completion": "d", "prompt": "c"}
    assert dataset.fingerprint([one, two]) == dataset.fingerprint([dict(reversed(one.items())), dict(two)])
    assert dataset.fingerprint([one, two]) != dataset.fingerprint([two, one])
    # Written down: a hash kept in a manifest must mean the same next year.
    assert dataset.fingerprint([{"prompt": "é", "n": 1}]) == "9a32770d7a8ad222"


# --------------------------------------------------------------------------------------------------------- faults


def test_a_missing_file_names_its_neighbours(jsonl, tmp_path):
    jsonl(SFT)
    message = refused(tmp_path / "chat.jsonl")
    assert "chat.jsonl: no such file" in message and "did you mean chats.jsonl?" in message
    assert "there is no folder" in refused(tmp_path / "nowhere" / "chats.jsonl")


ROW_FAULTS = [
    # kind, row, parts of the message
    (
        "sft",
        {"question": "a", "completion": "b"},
        ["no field 'prompt'", "question, completion", "data.columns.prompt=question"],
    ),
    ("sft", {"prompt": "a", "text": "b"}, ["no field 'completion'", "data.columns.completion=text"]),
    ("sft", {"prompt": 3, "completion": "b"}, ["'prompt' is int 3", "expected a string or a list of messages"]),
    ("sft", {"prompt": None, "completion": "b"}, ["'prompt' is null"]),
    ("sft", {"prompt": "a", "completion": " \n"}, ["'completion' is an empty string", "remove the row"]),
    ("sft", {"prompt": "a", "completion": 1.5}, ["'completion' is float 1.5", "expected a string"]),
    ("sft", {"prompt": [], "completion": "b"}, ["'prompt' is an empty list"]),
    (
        "sft",
        {"prompt": [{**USER, "role": "human"}], "completion": "b"},
        ["'prompt[0].role' is str 'human'", "system, "],
    ),
    ("sft", {"prompt": [{"role": "user"}], "completion": "b"}, ["'prompt[0]' is dict", '"content"']),
    ("sft", {"prompt": [{**USER, "content": ""}], "completion": "b"}, ["'prompt[0].content' is an empty string"]),
    ("sft", {"prompt": [USER, ANSWER], "completion": "b"}, ["'prompt' ends with an assistant message"]),
    ("sft", {"prompt": "a", "completion": [USER]}, ["'completion' has messages of user", "a single one of assistant"]),
    ("sft", {"messages": [USER]}, ["'messages' has messages of user", "the assistant's last"]),
    ("sft", {"messages": "hello"}, ["'messages' is str 'hello'", "expected a list of messages"]),
    ("preference", {"prompt": "a", "chosen": "b"}, ["no field 'rejected'", "prompt, chosen"]),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, ["chosen and rejected are the same text 'b'"]),
    (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": [USER, ANSWER]},
        ["'rejected' has messages of user, ass"],
    ),
    ("prompt", {"text": "a"}, ["no field 'prompt'", "data.columns.prompt=text"]),
    ("prompt", {"prompt": "a", "reference": 2}, ["'reference' is int 2"]),
    ("prompt", {}, ["no field 'prompt'", "the row has none"]),
]


@pytest.mark.parametrize("kind,row,parts", ROW_FAULTS)
def test_a_faulty_row_is_named_with_what_mends_it(jsonl, kind, row, parts):
    good = PAIR if kind == "preference" else SFT
    message = refused(jsonl(good, "", row), kind)
    assert "chats.jsonl line 3: " in message, "blank lines count: it is the line an editor shows"
    assert all(part in message for part in parts), message


def test_the_mapping_the_message_proposes_mends_the_row(jsonl):
    path = jsonl({"question": "a", "answer": "b"})
    assert "data.columns.prompt=question" in refused(path)
    assert "data.columns.completion=answer" in refused(path, columns={"prompt": "question"})
    assert Data(path, columns={"prompt": "question", "completion": "answer"}).rows("sft")


@pytest.mark.parametrize(
    "name,text,parts",
    [
        ("x.jsonl", '{"prompt": "a", \n', ["x.jsonl line 1: not JSON", "column"]),
        ("x.jsonl", "[1]\n", ["x.jsonl line 1: found list [1]", "expected an object"]),
        ("x.jsonl", "\n \n", ["no rows", "expected at least one sft row"]),
        ("x.json", '{"prompt": "a"}\n{"prompt": "b"}', ["x.json line 2: not JSON", "rename it to .jsonl"]),
        ("x.json", '{"prompt": "a"}', ["x.json: found dict", "expected a list of objects"]),
        ("x.json", '[{"prompt": "a", "completion": "b"}, 3]', ["x.json row 2: found int 3"]),
        ("x.json", "[]", ["no rows"]),
        ("x.csv", "prompt,completion\na,b\nc,d,e\n", ["x.csv row 2: found 3 columns, expected 2"]),
        ("x.csv", "prompt,completion\na\n", ["x.csv row 1: found 1 columns, expected 2"]),
        ("x.csv", 'prompt,completion\na,"b\n', ["x.csv row 1: not CSV"]),
        ("x.csv", "prompt,completion\na,\n", ["x.csv row 1: 'completion' is an empty string"]),
        ("x.csv", "", ["no rows"]),
        ("x.parquet", "PAR1 it is not", ["x.parquet: unreadable Parquet"]),
        ("x.txt", "hello", ["files '.txt' are not read", ".parquet"]),
    ],
)
def test_a_faulty_file_is_named(tmp_path, name, text, parts):
    (tmp_path / name).write_text(text)
    message = refused(tmp_path / name)
    assert all(part in message for part in parts), message


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    assert "expected UTF-8 text" in refused(tmp_path / "x.jsonl")


def test_faulty_folders_are_named(tmp_path):
    import datasets

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("")
    assert "holds no saved data set (it holds: a.txt)" in refused(tmp_path / "folder")
    (tmp_path / "folder" / "dataset_info.json").write_text("{")
    assert "unreadable data set" in refused(tmp_path / "folder")
    datasets.DatasetDict({"test": datasets.Dataset.from_list([SFT])}).save_to_disk(tmp_path / "dict")
    message = refused(tmp_path / "dict")
    assert "data.split=train" in message and "has test: choose one" in message


def test_a_hub_id_that_cannot_be_had_is_refused(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'org/chats' on the Hub\n(a second line)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refused("org/chats")
    assert "data.path=org/chats" in message and "Couldn't reach" in message


@pytest.mark.parametrize(
    "settings,parts",
    [
        ({"path": "???"}, ["data.path is not set"]),
        ({"path": "x.jsonl", "limit": 0}, ["data.limit=0", "at least 1"]),
        ({"path": "x.jsonl", "columns": {"promt": "q"}}, ["data.columns.promt", "did you mean data.columns.prompt?"]),
        ({"path": "demo:chitchat/trian"}, ["demo:chitchat/trian", "did you mean demo:chitchat/train?"]),
        ({"path": "demo:other"}, ["no such demo data", "demo:chitchat/heldout"]),
    ],
)
def test_a_faulty_setting_is_refused_before_anything_is_read(settings, parts):
    with pytest.raises(InputError) as caught:
        Data(**settings).check()
    assert all(part in str(caught.value) for part in parts), caught.value


# --------------------------------------------------------------------------------------------------------- tokens


def test_a_text_has_the_same_ids_on_every_path(tokenizer):
    for prompt in ("How are you?", [{"role": "system", "content": "Be good."}, USER]):
        rows = [{"prompt": prompt, "completion": "I am happy.", "chosen": "I am happy.", "rejected": "No."}]
        sft = tokens.sft_dataset(rows, tokenizer, 200)[0][0]
        pair = tokens.preference_dataset(rows, tokenizer, 200)[0][0]
        batch = tokens.collate_prompts(tokens.prompt_dataset(rows, tokenizer, 200)[0], tokenizer.pad_token_id)
        prompt_ids = batch.prompt_ids[0].tolist()
        response_ids = tokens.encode_response(tokenizer, "I am happy.")

        assert sft["input_ids"] == pair["chosen_ids"] == prompt_ids + response_ids
        assert sft["completion_mask"] == [0] * len(prompt_ids) + [1] * len(response_ids)
        assert pair["rejected_ids"] == prompt_ids + tokens.encode_response(tokenizer, "No.")


def test_the_tiny_tokenizer_is_as_its_module_says(tokenizer):
    assert len(tokenizer) == VOCAB and tokenizer.pad_token_id != tokenizer.eos_token_id
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == len(tokenizer(f" {word}").input_ids) == 1
    assert tokenizer.decode(tokenizer("Any ASCII ~ text,\nin {lines}!").input_ids) == "Any ASCII ~ text,\nin {lines}!"


def test_prompt_and_response_are_what_the_template_renders(tokenizer):
    assert tokenizer.decode(tokens.encode_prompt(tokenizer, "Hello")) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokens.encode_prompt(tokenizer, "Hello") == tokens.encode_prompt(
        tokenizer, [{"role": "user", "content": "Hello"}]
    )
    response = tokens.encode_response(tokenizer, "good day")
    assert tokenizer.decode(response) == "good day<|im_end|>"
    assert response.count(tokenizer.eos_token_id) == 1
    assert tokens.encode_response(tokenizer, "good day<|im_end|>") == response, "an eos that is there is not doubled"


def test_without_a_template_a_string_is_verbatim_and_messages_are_refused(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = None
    assert tokenizer.decode(tokens.encode_prompt(tokenizer, "Hello day")) == "Hello day"
    with pytest.raises(InputError, match=r"no chat template.*model\.chat_template"):
        tokens.encode_prompt(tokenizer, [USER])


@pytest.mark.parametrize("template", [None, "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_there_is_never_a_second_bos_nor_an_eos_after_a_prompt(tmp_path, template):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = template
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<|im_start|> $A {EOS}", special_tokens=[("<|im_start|>", bos), (EOS, eos)]
    )
    hello = tokens.encode_response(tokenizer, "Hello")[:-1]
    assert tokens.encode_prompt(tokenizer, "Hello") == [bos, *hello]
    assert tokens.encode_prompt(tokenizer, "<|im_start|>Hello") == [bos, *hello]
    assert tokens.encode_response(tokenizer, "Hello") == [*hello, eos]


def test_a_template_that_refuses_the_roles_is_reported(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('only user and assistant') }}"
    with pytest.raises(InputError, match="refuses messages of user: only user and assistant"):
        tokens.encode_prompt(tokenizer, [USER])


def resaved(folder, **changes):
    """The tiny tokenizer saved with some special tokens changed, loaded as the project does."""
    tokenizer = tiny_tokenizer(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return tokens.load_tokenizer(folder)


def test_pad_is_never_eos(tmp_path, tokenizer):
    assert tokenizer.pad_token == PAD and tokenizer.padding_side == "left"
    # pad = eos, as many models ship: the vocabulary's own unused pad token is found again, nothing is added
    found = resaved(tmp_path / "same", pad_token=EOS)
    assert (found.pad_token, len(found)) == (PAD, len(tokenizer))
    # with eos in its place too, padding is another token that is there: nothing is added
    other = resaved(tmp_path / "none", pad_token=None, eos_token=PAD)
    assert len(other) == len(tokenizer) and other.pad_token_id not in (other.eos_token_id, *other("Ω").input_ids)


def test_tokenizer_hash_tells_tokenizers_apart_and_survives_saving(tmp_path, tokenizer):
    same = tokens.load_tokenizer(tokenizer.save_pretrained(tmp_path / "a") and tmp_path / "a")
    assert tokens.tokenizer_hash(same) == tokens.tokenizer_hash(tokenizer)
    same.padding_side = "right"
    assert tokens.tokenizer_hash(same) == tokens.tokenizer_hash(tokenizer), "padding does not change the ids of a text"
    template = tokens.load_tokenizer(tmp_path / "a", chat_template="{{ messages[0]['content'] }}")
    other_pad = resaved(tmp_path / "b", pad_token="<unk>")
    assert len({tokens.tokenizer_hash(t) for t in (tokenizer, template, other_pad)}) == 3


def test_chat_template_may_be_a_file(tmp_path):
    tiny_tokenizer(tmp_path / "t")
    (tmp_path / "short.jinja").write_text("{{ messages[0]['content'] }}:")
    tokenizer = tokens.load_tokenizer(tmp_path / "t", chat_template=str(tmp_path / "short.jinja"))
    assert tokenizer.decode(tokens.encode_prompt(tokenizer, "Hello")) == "Hello:"
    with pytest.raises(InputError, match=r"neither a Jinja text nor a file: did you mean short\.jinja\?"):
        tokens.load_tokenizer(tmp_path / "t", chat_template=str(tmp_path / "shrt.jinja"))


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(InputError, match=r"is no model: it has no tokenizer\.json \(it holds: weights\.bin\)"):
        tokens.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such model folder"):
        tokens.load_tokenizer(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="no tokenizer could be loaded"):
        tokens.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no eos_token"):
        resaved(tmp_path / "t", eos_token=None)


# ------------------------------------------------------------------------------------------- what the trainers read


def test_long_rows_are_left_out_whole_and_counted(tokenizer):
    rows = [{**SFT, **PAIR}, {**SFT, **PAIR, "prompt": "How are you today? " * 20}, {**SFT, **PAIR, "prompt": "Hello"}]
    for make in (tokens.sft_dataset, tokens.preference_dataset):
        kept, dropped = make(rows, tokenizer, 40)
        assert (len(kept), dropped.kept, dropped.too_long) == (2, 2, 1)
        assert dropped.describe() == "2 rows (1 of 3 left out, longer than 40 tokens)"
        assert kept[0] == make(rows[:1], tokenizer, 1000)[0][0], "what stays is not cut"
        assert make(rows, tokenizer, 1000)[1].describe() == "3 rows"
    prompts, dropped = tokens.prompt_dataset(rows, tokenizer, 30)
    assert [prompt["index"] for prompt in prompts] == [0, 2], "an index names the row of the data set"
    assert [prompt["meta"] for prompt in prompts] == [rows[0], rows[2]]
    assert (dropped.kept, dropped.too_long) == (2, 1)


def test_a_pair_goes_when_only_one_side_is_long_and_the_limit_itself_fits(tokenizer):
    rows = [{**PAIR, "rejected": "Sad. " * 50}, PAIR]
    kept, dropped = tokens.preference_dataset(rows, tokenizer, 40)
    assert (len(kept), dropped.too_long) == (1, 1)
    length = len(tokens.sft_dataset([SFT], tokenizer, 1000)[0][0]["input_ids"])
    assert tokens.sft_dataset([SFT], tokenizer, length)[1].kept == 1
    with pytest.raises(InputError, match=f"max_length={length - 1} tokens: all 1 rows are longer .*{length}"):
        tokens.sft_dataset([SFT], tokenizer, length - 1)
    with pytest.raises(InputError, match="max_prompt_length=2 tokens: all 1 rows"):
        tokens.prompt_dataset([SFT], tokenizer, 2)


def test_collate_pads_on_the_left(tokenizer):
    prompts = [{"ids": [5, 6, 7], "index": 4, "meta": {"a": 1}}, {"ids": [8], "index": 2, "meta": {"a": 2}}]
    batch = tokens.collate_prompts(prompts, pad_id=1)
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert batch.prompt_mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.prompt_index.tolist() == [4, 2] and batch.meta == [{"a": 1}, {"a": 2}]
    assert str(batch.prompt_ids.dtype) == "torch.int64" and str(batch.prompt_mask.dtype) == "torch.bool"


# -------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("size,step", [(10, 4), (7, 7), (5, 12), (8, 2)])
def test_an_epoch_uses_every_prompt_once_also_across_steps(size, step):
    sampler = PromptSampler(size, seed=3)
    stream = [index for _ in range(3 * size) for index in sampler.next(step)]
    assert len(stream) == 3 * size * step
    epochs = [stream[start : start + size] for start in range(0, 3 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 2:
        assert epochs[0] != epochs[1], "every epoch has an order of its own"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_prompts_of_a_step_do_not_depend_on_the_number_of_ranks(world):
    whole = PromptSampler(10, seed=1)
    ranks = [PromptSampler(10, seed=1) for _ in range(world)]
    for _ in range(7):
        step = whole.next(8)
        shares = [sampler.next(8, rank, world) for rank, sampler in enumerate(ranks)]
        assert {len(share) for share in shares} == {8 // world}
        assert [shares[place % world][place // world] for place in range(8)] == step
        assert Counter(index for share in shares for index in share) == Counter(step)


def test_resume_gives_the_steps_that_would_have_come():
    sampler = PromptSampler(11, seed=5)
    for _ in range(4):
        sampler.next(4)
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = [sampler.next(4) for _ in range(10)]
    resumed = PromptSampler(11, seed=0)
    resumed.load_state_dict(state)
    assert [resumed.next(4) for _ in range(10)] == expected
    with pytest.raises(InputError, match="from 11 prompts, the data set has 12"):
        PromptSampler(12).load_state_dict(state)


def test_the_order_is_fixed_for_good():
    # Written down: an order that changes with a Python version would change every published run.
    assert PromptSampler(8, seed=0).next(8) == [3, 7, 5, 2, 4, 1, 6, 0]
    assert PromptSampler(8, seed=1).next(8) != PromptSampler(8, seed=0).next(8)


def test_trl_takes_the_columns_as_they_are(tmp_path):
    """The contract stated in `sft_dataset` and `preference_dataset`, against the TRL that is installed."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    folder = tiny_model(tmp_path / "model")
    tokenizer = tokens.load_tokenizer(folder)
    common = {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
    }
    ours, _ = tokens.sft_dataset([SFT], tokenizer, 200)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        SFTConfig(**common, completion_only_loss=True, max_length=None),
        train_dataset=ours,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"][0].tolist() == ours[0]["input_ids"]
    expected = [i if m else -100 for i, m in zip(ours[0]["input_ids"], ours[0]["completion_mask"], strict=True)]
    assert batch["labels"][0].tolist() == expected and expected[-1] == tokenizer.eos_token_id

    pairs, _ = tokens.preference_dataset([PAIR], tokenizer, 200)
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1),
        RewardConfig(**common, max_length=None),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    for row, side in enumerate(("chosen_ids", "rejected_ids")):
        kept = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert kept.tolist() == pairs[0][side]
