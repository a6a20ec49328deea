"""Chat templates: rendered as transformers does, but for the moment; which one; what they drop or change."""

from __future__ import annotations

import json

import pytest
from tiny import SENTENCES, TEMPLATE, tiny_tokenizer

from alignkit.check.model import check_template
from alignkit.config import stages
from alignkit.core.errors import InputError
from alignkit.data import chat, tokens
from alignkit.stages import token_ids

DATED = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + TEMPLATE
SYSTEM, USER, ANSWER = (
    {"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "Hi  "), ("assistant", "Yo"))
)
TALK = [SYSTEM, USER, ANSWER, {"role": "user", "content": "café <b>&\"'</b> {{ x }}"}]
FEATURES = {
    "plain": TEMPLATE,
    "tojson": "{{ messages | tojson }}",
    "tojson with options": "{{ messages[0] | tojson(indent=1, separators=(',', ':'), sort_keys=True, ensure_ascii=True) }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ bos_token is defined }}",
    "tools and documents": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ xml_tools is defined }}",
    "a date if there is one": "{{ strftime_now is defined }}{{ raise_exception is defined }}",
    "generation has a scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{{ messages[2].content }}{% endgeneration %}{{ x }}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "name spaces": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "macros": "{% macro m(x) %}[{{ x.role }}]{{ x['content'] | trim }}{% endmacro %}{% for x in messages %}{{ m(x) }}{% endfor %}",
    "trimmed blocks": "  {% if true %}\n  a\n  {% endif %}\n{{- add_generation_prompt }}\n",
    "filters": "{{ messages | map(attribute='role') | unique | join(',') }}{{ messages[1:] | selectattr('role', 'equalto', 'user') | list | length }}",
    "ranges": "{% for i in range(3, 0, -1) %}{{ i }}{{ loop.index0 }}{% endfor %}",
    "methods of texts": "{{ messages[1]['content'].strip().split('i')[0] }}{{ 'x'.startswith('x') }}{{ messages[-1].content[:4] | upper }}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", FEATURES)
def test_ranks_and_checks_render_what_transformers_renders(tokenizer, tmp_path, name):
    tokenizer.chat_template = FEATURES[name]
    expected = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert tokens.prompt_text(tokenizer, TALK) == (expected, False)
    tokenizer.save_pretrained(tmp_path)
    assert chat.template_of(tmp_path, None).render(TALK) == expected


# ------------------------------------------------------------------------------------------------------------ the date


@pytest.fixture
def dated(tmp_path):
    tiny_tokenizer(tmp_path / "dated")
    (tmp_path / "dated/chat_template.jinja").write_text(DATED)
    return tmp_path / "dated"


def test_a_template_is_told_the_date_that_is_given_and_keeps_it_when_saved(dated, tmp_path):
    first = tokens.load_tokenizer(dated, template_date="2026-05-01")
    assert "Today: 01 May 2026" in first.decode(tokens.encode_prompt(first, "Hello"))
    tokens.save_tokenizer(first, tmp_path / "run")
    later = tokens.load_tokenizer(tmp_path / "run")
    assert tokens.encode_prompt(later, "Hello") == tokens.encode_prompt(first, "Hello")
    assert tokens.tokenizer_hash(later) == tokens.tokenizer_hash(first)
    other = tokens.load_tokenizer(tmp_path / "run", template_date="2026-05-02")
    assert tokens.tokenizer_hash(other) != tokens.tokenizer_hash(first)
    assert chat.template_of(tmp_path / "run", None).render([USER]) == tokens.prompt_text(first, [USER])[0]


def test_without_a_date_nothing_is_encoded(dated):
    with pytest.raises(InputError, match=r"strftime_now.*set model\.template_date=20\d\d-\d\d-\d\d"):
        tokens.encode_prompt(tokens.load_tokenizer(dated), "Hello")


def test_a_reward_model_of_an_earlier_day_reads_the_ids_it_was_trained_on(dated, tmp_path):
    before = tokens.load_tokenizer(dated, template_date="2026-05-01")
    tokens.save_tokenizer(before, tmp_path)
    token_ids.write([{"prompt": "Hello", "chosen": "Good.", "rejected": "Bad."}], before, tmp_path)
    assert "reads the token ids" in token_ids.check(tmp_path, tokens.load_tokenizer(tmp_path))
    with pytest.raises(InputError, match="other token ids"):
        token_ids.check(tmp_path, tokens.load_tokenizer(dated, template_date="2026-05-02"))


def test_the_date_is_the_given_one_else_that_of_the_attempt_before_else_that_of_the_model(dated, tmp_path):
    tokens.save_tokenizer(tokens.load_tokenizer(dated, template_date="2026-05-01"), tmp_path / "run")
    folders = [dated, tmp_path / "run"]
    assert chat.date_to_tell(folders, None, "2026-05-03", "2026-05-02") == "2026-05-03"
    assert chat.date_to_tell(folders, None, None, "2026-05-02") == "2026-05-02"
    assert chat.date_to_tell(folders, None, None, None) == "2026-05-01"
    assert chat.date_to_tell([dated], None, None, None) == chat.date.today().isoformat()
    tiny_tokenizer(tmp_path / "undated")
    assert chat.date_to_tell([tmp_path / "undated"], None, None, None) is None
    with pytest.raises(InputError, match=r"template_date=2026-05-03: the chat template asks for no date"):
        chat.date_to_tell([tmp_path / "undated"], None, "2026-05-03", None)


def test_a_config_without_a_date_has_the_hash_it_had_before_there_was_one():
    plain, told = stages.SFT(run_name="x"), stages.SFT(run_name="x")
    told.model.template_date = "2026-05-01"
    assert stages.config_hash(plain) != stages.config_hash(told)
    old = json.loads(json.dumps({"model": {"path": "m", "dtype": "float32"}}))
    new = {"model": old["model"] | {"template_date": None}}
    assert stages.config_hash(stages.OmegaConf.create(old)) == stages.config_hash(stages.OmegaConf.create(new))


@pytest.mark.parametrize("date", ["today", "2026-5-1", "20260501", "2026-13-01"])
def test_what_is_no_date_is_refused(date):
    with pytest.raises(InputError, match=r"model\.template_date='.*': expected a date as 2026-05-31"):
        stages.Model(path="x", template_date=date)


@pytest.mark.parametrize("chance", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_there_is_no_chance_in_a_template(chance):
    with pytest.raises(InputError, match=r"random|lipsum"):
        chat.Template(chance, "t.jinja").render([USER])


def test_a_template_that_would_never_end_is_refused():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match=r"t\.jinja.*loops over more than 100,000 numbers"):
        chat.Template(loops, "t.jinja").render([USER])


# ---------------------------------------------------------------------------------------------------- which one it is


@pytest.fixture(params=["tokenizer_config.json", "additional_chat_templates"])
def named(tmp_path, request):
    """A tokenizer with templates called rag and tool_use, and none called default."""
    tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    if request.param == "additional_chat_templates":
        (tmp_path / request.param).mkdir()
        for name in ("rag", "tool_use"):
            (tmp_path / request.param / f"{name}.jinja").write_text(f"{name}: {TEMPLATE}")
        return tmp_path
    settings = json.loads((tmp_path / request.param).read_text())
    settings["chat_template"] = [{"name": name, "template": f"{name}: {TEMPLATE}"} for name in ("rag", "tool_use")]
    (tmp_path / request.param).write_text(json.dumps(settings))
    return tmp_path


def test_of_several_templates_the_one_to_use_is_asked_for(named):
    with pytest.raises(InputError, match=r"rag, tool_use.*model\.chat_template=rag or model\.chat_template=tool_use"):
        check_template(named, None, "model.path=model")
    with pytest.raises(InputError, match=r"model\.chat_template=rag"):
        tokens.load_tokenizer(named)
    bare = tokens.load_tokenizer(named, chat_template="rag")
    bare.chat_template = {name: text for name, text in bare.chat_template.items() if name != "default"}
    with pytest.raises(InputError, match=r"model\.chat_template=rag"):
        tokens.encode_prompt(bare, "Hello")


def test_a_named_template_is_used_everywhere_and_is_the_default_once_saved(named, tmp_path_factory):
    check_template(named, "rag", "model.path=model")
    tokenizer = tokens.load_tokenizer(named, chat_template="rag")
    text = tokens.prompt_text(tokenizer, "Hello")[0]
    assert text.startswith("rag: <|im_start|>user") and chat.template_of(named, "rag").render([USER]).startswith(
        "rag: "
    )
    tokens.save_tokenizer(tokenizer, run := tmp_path_factory.mktemp("run"))
    for wanted in (None, "rag"):  # a pipeline hands its setting to every stage
        later = tokens.load_tokenizer(run, chat_template=wanted)
        assert tokens.prompt_text(later, "Hello")[0] == text
        assert tokens.tokenizer_hash(later) == tokens.tokenizer_hash(tokenizer)
    with pytest.raises(InputError, match=r"chat_template=toll_use: neither.*rag, tool_use"):
        tokens.load_tokenizer(named, chat_template="toll_use")


# ------------------------------------------------------------------------------------------ what it drops or changes

HEAD = "{% if add_generation_prompt %}A:{% endif %}"
EACH = "{% for m in messages %}"
CHANGES = {
    "drops system messages": (EACH + "{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}", [SYSTEM, USER]),
    "writes system messages as a user's": (EACH + "<{{ 'A' if m.role == 'assistant' else 'U' }}>{{ m.content }}{% endfor %}", [SYSTEM, USER]),
    "writes system and user messages as one": (
        "{% set s = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ s if loop.first }}{{ m.content }}{% endfor %}",
        [SYSTEM, USER],
    ),
    "writes user and user messages as one": (
        EACH + "{% if loop.previtem is defined and loop.previtem.role == m.role %}\n{% else %}<{{ m.role }}>{% endif %}{{ m.content }}{% endfor %}",
        [USER, USER],
    ),
    "changes the order of the messages": (
        "{% for m in messages | sort(attribute='role', reverse=true) %}<{{ m.role }}>{{ m.content }}{% endfor %}", [SYSTEM, USER],
    ),
    "strips white space at the ends of user messages": (EACH + "<{{ m.role }}>{{ m.content | trim }}{% endfor %}", [USER]),
    "drops or changes text of user messages": (EACH + "<{{ m.role }}>{{ m.content[:8] }}{% endfor %}", [{"role": "user", "content": SENTENCES[0]}]),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_template_drops_or_changes_is_said(what):
    text, messages = CHANGES[what]
    template = chat.Template(text + HEAD, "t.jinja")
    assert template.change(messages)[0] == what
    fine = {"prompt": "Hi"}
    assert chat.changes(template, [{"prompt": messages}, fine, fine]) == [f"{what} in 1 of 3 rows"]
    assert chat.changes(template, [fine, fine]) == []


def test_a_faithful_template_changes_nothing():
    assert chat.changes(chat.Template(TEMPLATE, "t.jinja"), [{"prompt": TALK}, {"prompt": " x "}]) == []


def test_of_many_rows_some_are_looked_at_and_that_is_said():
    template = chat.Template(CHANGES["strips white space at the ends of user messages"][0], "t.jinja")
    assert chat.changes(template, [{"prompt": "x "}] * 1000) == [
        "strips white space at the ends of user messages in 200 of 200 rows looked at"
    ]


def test_a_system_message_that_the_template_brings_itself_is_told():
    own = (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nI am Tiny.<|im_end|>\n' }}{% endif %}" + TEMPLATE
    )
    assert chat.Template(own, "t.jinja").own_system() == "I am Tiny."
    assert chat.Template(TEMPLATE, "t.jinja").own_system() is None
