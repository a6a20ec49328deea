"""One end of a turn: tokenizer, template and generation_config.json joined; and padding that makes no new row."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date

import pytest
import torch
from tiny import EOS, PAD, SENTENCES, TEMPLATE, tiny_model, tiny_tokenizer

from alignkit.algorithms import functional as F
from alignkit.core.errors import InputError
from alignkit.data import ends, tokens
from alignkit.models import loading
from alignkit.models.config import Model
from alignkit.models.score_heads import score_head
from alignkit.rewards.base import response_texts
from alignkit.rollout.base import Context, Sampling
from alignkit.stages import token_ids

END = "<|endoftext|>"


@pytest.fixture
def two(tmp_path):
    """A tokenizer whose eos is <|endoftext|> and whose template closes turns with <|im_end|>; the model names both."""
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"eos_token": END, "additional_special_tokens": ["<|im_start|>", EOS]})
    tokenizer.save_pretrained(tmp_path)
    name_ends(tmp_path, tokenizer.convert_tokens_to_ids([END, EOS]))
    return tmp_path


def name_ends(folder, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))


def changed(folder, **settings):
    """Settings of a saved tokenizer replaced, as a person does it."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def test_an_answer_ends_with_what_the_template_closes_it_with(two, tmp_path_factory):
    tokenizer = tokens.load_tokenizer(two)
    end, old = tokenizer.convert_tokens_to_ids([EOS, END])
    assert tokens.encode_response(tokenizer, "good")[-1] == end and tokens.stops(tokenizer) == [end, old]
    assert tokenizer.pad_token_id not in (end, old)
    tokens.save_tokenizer(tokenizer, run := tmp_path_factory.mktemp("run"))
    later = tokens.load_tokenizer(run, base=two)
    assert tokens.tokenizer_hash(later) == tokens.tokenizer_hash(tokenizer) and set(tokens.stops(later)) == {end, old}
    assert ends.of_folders(two, two, None) == tokenizer.notes
    assert EOS in tokenizer.notes[0] and END in tokenizer.notes[0] and "rollouts stop at each" in tokenizer.notes[-1]


def test_where_all_agree_nothing_is_said_and_nothing_changes(tmp_path):
    before = tiny_tokenizer(tmp_path)
    name_ends(tmp_path, before.eos_token_id)
    tokenizer = tokens.load_tokenizer(tmp_path)
    assert tokenizer.notes == ends.of_folders(tmp_path, tmp_path, None) == []
    assert tokens.stops(tokenizer) == [before.eos_token_id] and tokens.tokenizer_hash(
        tokenizer
    ) == tokens.tokenizer_hash(before)


CLOSED = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}CLOSE{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.mark.parametrize(
    ("close", "eos", "words"),
    [
        (EOS, EOS, ""),  # as most do
        ("\n" + EOS + "\n", EOS, ""),  # white space around it
        ("{{ eos_token }}", END, ""),
        (EOS + "{{ eos_token }}", END, "writes the eos token"),  # a prompt would change with the eos token
        ("{% if loop.last %}" + EOS + "{% endif %}", EOS, "as the chat template closes one"),
        ("</end>", END, "'</end>'"),  # plain text
        ("", END, "''"),
    ],
)
def test_the_end_is_read_off_the_template(two, close, eos, words):
    name_ends(two, [])
    tokenizer = tokens.load_tokenizer(two, chat_template=CLOSED.replace("CLOSE", close))
    assert tokenizer.eos_token == eos and words in " ".join(tokenizer.notes)
    assert tokenizer.eos_token_id == tokens.stops(tokenizer)[0]
    closing = EOS if EOS in close else END
    assert tokenizer.convert_tokens_to_ids(closing) in tokens.stops(tokenizer)


@pytest.mark.parametrize(("named", "stops"), [(3, [3]), ([3, 5], [3, 5]), ([5], [3, 5]), ([], [3]), (None, [3])])
def test_rollouts_stop_at_what_generation_config_names(tmp_path, named, stops):
    tiny_tokenizer(tmp_path)
    name_ends(tmp_path, named)
    assert tokens.stops(tokens.load_tokenizer(tmp_path)) == stops


def test_an_end_outside_the_vocabulary_is_said_and_an_end_that_is_none_is_refused(tmp_path):
    tiny_tokenizer(tmp_path)
    name_ends(tmp_path, [3, 128001])
    (note,) = ends.of_folders(tmp_path, tmp_path, None)
    assert (
        "128001" in note and "generation_config.json" in note and tokens.stops(tokens.load_tokenizer(tmp_path)) == [3]
    )
    name_ends(tmp_path, "<|im_end|>")
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id='<\|im_end\|>': expected the id"):
        ends.named_ends(tmp_path)


def test_a_saved_model_names_its_ends(two, tmp_path_factory):
    tokenizer = tokens.load_tokenizer(two)
    hf = loading.load_base(str(tiny_model(tmp_path_factory.mktemp("model"))), Model(path="x"), len(tokenizer))
    tokens.name_ends(hf, tokenizer)
    hf.save_pretrained(saved := tmp_path_factory.mktemp("saved"))
    assert ends.named_ends(saved) == tokens.stops(tokenizer) and len(ends.named_ends(saved)) == 2
    config = json.loads((saved / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_an_eos_token_outside_the_vocabulary_is_refused(tmp_path):
    tiny_tokenizer(tmp_path)
    changed(tmp_path, eos_token=None)
    with pytest.raises(InputError, match=r"has no eos_token.*set it in tokenizer_config\.json"):
        tokens.load_tokenizer(tmp_path)
    assert ends.words_of(tmp_path) is None and ends.of_folders(tmp_path, tmp_path, None) == []


def test_every_engine_is_given_all_ends():
    context = Context("", "", 0, 0, 3, 1, 1, stops=[3, 7])
    assert context.stop_ids(Sampling()) == [3, 7] and context.stop_ids(Sampling(stop_token_ids=[9, 7])) == [3, 7, 9]


def test_a_text_does_not_hold_its_end_whichever_it_is(tmp_path):
    tiny_tokenizer(tmp_path)
    word = tokens.load_tokenizer(tmp_path).convert_tokens_to_ids("good")
    name_ends(tmp_path, [3, word])  # an end that is no special token
    tokenizer = tokens.load_tokenizer(tmp_path)
    rollouts = token_ids.as_rollouts([{"prompt": "Hello!", "response": "sad"}], tokenizer)
    rollouts.response_ids[0, -1] = word
    assert response_texts(tokenizer, rollouts) == ["sad"]
    assert token_ids.same_ids(rollouts, tokenizer) == (1, 1)


def test_a_reward_model_reads_every_end_as_the_one_it_was_trained_on():
    ids = torch.tensor([[5, 6, 3, 0], [5, 7, 0, 0], [5, 7, 7, 9], [7, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    read = [
        [5, 6, 3, 0],
        [5, 3, 0, 0],
        [5, 7, 7, 9],
        [7, 0, 0, 0],
    ]  # 3 and 7 end; a cut row is left alone, and so is padding
    assert F.with_one_end(ids, mask, [3, 7]).tolist() == read


def test_a_score_is_that_of_the_trained_end(tmp_path):
    hf = loading.load_base(str(tiny_model(tmp_path)), Model(path="x"), 320)
    roles = loading.make_roles({"reward_model": hf}, {"reward_model": score_head(32)}, switch=lambda role: None)
    ids, mask, starts = torch.tensor([[5, 6, 3], [5, 6, 7]]), torch.ones(2, 3).bool(), torch.tensor([1, 1])
    apart = roles("reward_model", ids, mask, starts, 2)
    assert apart[0] != apart[1]
    roles.ends = [3, 7]
    one = roles("reward_model", ids, mask, starts, 2)
    assert one[0] == one[1] == apart[0]


# ------------------------------------------------------------------------------------------------------------- padding


def byte_level(folder, special=(END,)):
    """A tokenizer as GPT-2's: all 256 bytes, and nothing beside <|endoftext|>, which is bos, eos and unk."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as backends
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(backends.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END, unk_token=END).save_pretrained(
        folder
    )
    return folder


def no_bytes(folder):
    """A tokenizer of ASCII alone with no token to spare: only <unk> beside the ends."""
    tiny_tokenizer(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace(PAD, "<|im_start|>x")
        (folder / name).write_text(text.replace("<|im_start|>x", EOS + "y"))
    (folder / "chat_template.jinja").write_text(TEMPLATE + "{# " + EOS + "y #}")
    return changed(folder, pad_token=None, bos_token="<|im_start|>")


SPARE = {
    "of bytes that UTF-8 has not": (byte_level, "ÿ"),
    "a reserved token": (lambda f: byte_level(f, (END, "<|a|>", "<|reserved_7|>", "<|z|>")), "<|reserved_7|>"),
    "a token for nothing we do": (lambda f: byte_level(f, (END, "<|a|>", "<|z|>")), "<|z|>"),
    "the last word": (no_bytes, None),
}


@pytest.mark.parametrize("kind", SPARE)
@pytest.mark.parametrize("shipped", ["none", "eos"])
def test_padding_takes_a_token_that_is_there(tmp_path, kind, shipped):
    make, expected = SPARE[kind]
    folder = make(tmp_path / "m")
    eos = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    changed(folder, pad_token=eos if shipped == "eos" else None)
    tokenizer = tokens.load_tokenizer(folder)
    rows = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"].values()
    assert tokenizer.pad_token_id in rows and len(tokenizer) == max(rows) + 1  # no new row
    assert tokenizer.pad_token_id not in tokens.stops(tokenizer)
    assert expected is None or tokenizer.pad_token == expected
    assert ends.of_folders(folder, folder, None) == tokenizer.notes and "no new row" in tokenizer.notes[-1]
    # The same again once saved, and no text reads otherwise for it.
    texts = [*SENTENCES, "Müßiggang, L'Haÿ-les-Roses 6÷2 Þór", tokenizer.pad_token]
    before = [tokenizer(text).input_ids for text in texts]
    tokens.save_tokenizer(tokenizer, tmp_path / "run")
    later = tokens.load_tokenizer(tmp_path / "run")
    assert [later(text).input_ids for text in texts] == before and tokens.tokenizer_hash(
        later
    ) == tokens.tokenizer_hash(tokenizer)
    assert "" not in [
        later.decode(ids, skip_special_tokens=True) for ids in before[: None if kind == "the last word" else -1]
    ]
    assert [later.decode(ids) for ids in before[:-1]] == [tokenizer.decode(ids) for ids in before[:-1]]


def test_a_pad_token_that_a_run_added_before_is_still_read(tmp_path):
    old = tiny_tokenizer(tmp_path)
    old.add_special_tokens({"pad_token": "<|pad|>"})
    old.save_pretrained(tmp_path)
    tokenizer = tokens.load_tokenizer(tmp_path)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<|pad|>", 320, 321)


# -------------------------------------------------------------------------------------------------------- whole stages

REWARD = [
    "+reward@rewards.f=function",
    "rewards.f.target=my_reward.py:score",
    "logger=none",
    "rollout.max_new_tokens=8",
]


def run(cwd, *words, code=0):
    """What a command says; it must end with `code`."""
    ran = subprocess.run(
        [sys.executable, "-m", "alignkit", *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == code, (ran.stdout + ran.stderr)[-1500:]
    return ran.stdout + ran.stderr


def rows(path, *objects):
    path.write_text("".join(json.dumps(row) + "\n" for row in objects))


@pytest.fixture
def work(tmp_path):
    rows(tmp_path / "prompts.jsonl", *({"prompt": f"Hello number {i}"} for i in range(8)))
    rows(
        tmp_path / "pairs.jsonl",
        *({"prompt": f"Hello {i}", "chosen": "Yes, good.", "rejected": f"No {i}."} for i in range(8)),
    )
    (tmp_path / "my_reward.py").write_text(
        "def score(prompts, responses, meta): return [float(len(r)) for r in responses]\n"
    )
    return tmp_path


def says_good(folder):
    """A model that looks at the last token alone: it says "good", closes its turn, and would go on with "sad" for ever."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(folder)
    tokenizer.add_special_tokens({"eos_token": END, "additional_special_tokens": ["<|im_start|>", EOS]})
    tokenizer.save_pretrained(folder)
    n, ids = len(tokenizer), tokenizer.convert_tokens_to_ids
    shape = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            **shape, vocab_size=n, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, dtype="float32"
        )
    )
    with torch.no_grad():
        embedding = (
            torch.nn.functional.normalize(torch.randn(n, 64, generator=torch.Generator().manual_seed(0)), dim=1) * 8
        )
        model.model.embed_tokens.weight.copy_(embedding)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        head = torch.zeros(n, 64)
        for before, then in (("Ċ", "good"), ("good", EOS), (EOS, "sad"), ("sad", "sad")):
            head[ids(then)] += embedding[ids(before)] * 1.25
        model.lm_head.weight.copy_(head)
    model.generation_config = GenerationConfig(eos_token_id=ids([END, EOS]))
    model.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("rollout", ["hf", "vllm"])
def test_a_turn_ends_where_the_model_says_it_ends(work, rollout):
    says_good(work / "model")
    stage = ["evaluate", "run_name=x", "+policies.a=model", "data.path=prompts.jsonl", *REWARD, f"rollout={rollout}"]
    dry, said = run(work, *stage, "dry_run=true"), run(work, *stage)
    assert all("an answer ends with '<|im_end|>', as the chat template closes one" in text for text in (dry, said))
    answers = [json.loads(line) for line in (work / "runs/x/evaluate/samples.jsonl").open()]
    assert len(answers) == 8 and all(row["response"] == "good" and row["finished"] for row in answers)


@pytest.mark.slow
def test_no_row_is_made_for_padding_and_the_saved_reward_model_scores_alike_elsewhere(work):
    """A model as GPT-2, without a token to pad with: the adapter loads on its plain base, and the whole model's score is
    that of transformers' own class."""
    from peft import PeftModel
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        GPT2Config,
        GPT2LMHeadModel,
    )

    byte_level(work / "model")
    (work / "model/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    shape = {
        "vocab_size": 300,
        "n_positions": 512,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(work / "model")
    rows(work / "rows.jsonl", *({"prompt": f"Hello {i}", "completion": "Yes."} for i in range(8)))
    given = ["model.path=model", "max_steps=1", "eval_fraction=0", "logger=none"]
    run(work, "sft", "run_name=p", "data.path=rows.jsonl", *given)
    run(
        work,
        "reward",
        "run_name=p",
        "data.path=pairs.jsonl",
        *given,
        "finetune=full",
        "optimizer.learning_rate=1e-3",
        "normalize=none",
    )
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(work / "model"), work / "runs/p/sft/model")
    folder = work / "runs/p/reward/model"
    theirs, plain = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    assert theirs.get_input_embeddings().weight.shape[0] == 300
    from alignkit.models.source import resolve_model

    tokenizer = tokens.load_tokenizer(folder)
    ours = loading.load_reward(resolve_model(str(work / "runs/p/reward")), Model(path="x"), len(tokenizer))
    ids = torch.tensor([tokens.encode_prompt(tokenizer, "Hello 3") + tokens.encode_response(tokenizer, "Yes, good.")])
    assert ids.tolist() == [
        plain(
            plain.apply_chat_template([{"role": "user", "content": "Hello 3"}], tokenize=False) + "Yes, good." + END
        ).input_ids
    ]
    with torch.no_grad():
        score = ours("reward_model", ids, torch.ones_like(ids).bool(), torch.tensor([5]), 3)
        padded = torch.nn.functional.pad(ids, (0, 3), value=tokenizer.pad_token_id)
        assert theirs(ids).logits.item() == pytest.approx(score.item(), abs=1e-5)
        assert theirs(padded, attention_mask=padded.ne(tokenizer.pad_token_id)).logits.item() == pytest.approx(
            score.item(), abs=1e-5
        )


@pytest.mark.slow
def test_the_date_of_a_run_is_that_of_its_resumption_and_of_the_stages_after_it(work):
    tiny_model(work / "model")
    template = "{{ 'Today: ' + strftime_now('%d %b %Y') }}" + TEMPLATE
    (work / "model/chat_template.jinja").write_text(template)
    given = ["data.path=pairs.jsonl", "max_steps=1", "eval_fraction=0", "logger=none"]
    first = ["reward", "run_name=a", "model.path=model", *given]
    today = run(work, *first, "dry_run=true")
    assert f"the chat template is told the date {date.today().isoformat()}" in today
    run(work, *first, "model.template_date=2026-05-01")
    assert "kept" in run(work, *first, "resume=true")  # as on a later day, without naming the date
    ppo = [
        "ppo",
        "run_name=a",
        "model.path=model",
        "data.path=prompts.jsonl",
        "rewards.reward_model.path=runs/a/reward",
        "logger=none",
    ]
    assert "told the date 2026-05-01" in run(work, *ppo, "dry_run=true")
