"""Chat templates and token counts without transformers: the one renderer of ranks, plans and checks on the command line.

Jinja is set up as transformers sets it up, but for what depends on the moment: a template that asks for the date is told
`Template.date`, and there is no chance in it. What trains and scores is encoded by `tokens.py` alone.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from alignkit.core.errors import InputError
from alignkit.core.io import read_json
from alignkit.core.types import Message, Rows
from alignkit.data.files import near_files, short_repr

ASKS = "strftime_now"  # what a template calls to have the date
SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
DATE = "template_date"  # in tokenizer_config.json: the date that a model's template is told
ROUNDS = (
    100_000  # that the loops over ranges of one rendering may take together: a template from elsewhere may never end
)
SAMPLED = 200  # rows of a set whose rendering is looked at before a stage starts


@dataclass(frozen=True)
class Template:
    """A chat template and all that its text depends on beside the messages."""

    text: str  # Jinja
    where: str  # it stands, for messages
    special: tuple[tuple[str, str], ...] = ()  # ("eos_token", "</s>"), …: variables of the template
    date: str | None = None  # ISO: what `strftime_now` is told

    def render(self, messages: list[Message], key: str = "data", prompt: bool = True) -> str:
        """The text of `messages`, with the generation prompt where `prompt`.

        Raises:
            InputError: the template does not compile, refuses the messages, or asks for a date and has none.
        """
        from jinja2 import TemplateSyntaxError

        def strftime_now(form: str) -> str:
            if self.date is None:
                raise InputError(
                    f"{key}: the chat template {self.where} asks for the date ({ASKS}), so the same text would have other "
                    f"tokens every day: set model.template_date={date.today().isoformat()}"
                )
            return datetime.fromisoformat(self.date).strftime(form)

        rounds = 0

        def bounded(*numbers: int) -> range:
            nonlocal rounds
            rounds += len(range(*numbers))
            if rounds > ROUNDS:
                raise OverflowError(f"it loops over more than {ROUNDS:,} numbers")
            return range(*numbers)

        variables: dict[str, Any] = dict(self.special) | {"messages": messages, "tools": None, "documents": None}
        variables |= {ASKS: strftime_now, "range": bounded}
        try:
            return _compiled(self.text).render(variables | {"add_generation_prompt": prompt})
        except InputError:
            raise
        except TemplateSyntaxError as error:
            raise InputError(
                f"{key}: the chat template {self.where} has a syntax error in line {error.lineno}: {error.message}: mend that "
                "line, or set model.chat_template to another"
            ) from None
        except Exception as error:  # whatever a template may raise
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"{key}: the chat template {self.where} refuses messages of {roles}: {' '.join(str(error).split())}: change the "
                "messages, or set model.chat_template to another"
            ) from None

    def change(self, messages: list[Message], text: str | None = None) -> tuple[str, str] | None:
        """The first thing that the template drops or changes in a prompt: (what, of any prompt like it; of this one).

        Args:
            text: what `render` made of them, where that is known.

        Raises:
            InputError: it refuses them.
        """
        text = self.render(messages) if text is None else text
        roles = tuple(message["role"] for message in messages)
        what = _change_of_roles(self, roles)
        for role, content in ((message["role"], message["content"]) for message in messages):
            if content.strip() not in text:
                lost = f"the rendered prompt does not contain {short_repr(content)}"
                return what or f"drops or changes text of {role} messages", lost
            if content not in text and what is None:
                return f"strips white space at the ends of {role} messages", short_repr(content)
        return None if what is None else (what, f"messages of {', '.join(roles)}")

    def own_system(self) -> str | None:
        """The system message that the template puts in front of a prompt without one; None: none, or it takes none."""
        mark, user = "alpha", {"role": "user", "content": "omega"}
        try:
            ours, bare = self.render([{"role": "system", "content": mark}, user]), self.render([user])
        except InputError:
            return None
        before, found, behind = ours.partition(mark)
        middle = bare.removeprefix(before).removesuffix(behind)
        return middle.strip() or None if found and len(middle) == len(bare) - len(before) - len(behind) else None


def messages_of(prompt: str | list[Message]) -> list[Message]:
    """A prompt as messages: a string is what a user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


@lru_cache(maxsize=256)
def _change_of_roles(template: Template, roles: tuple[str, ...]) -> str | None:
    """What happens to messages of these roles, whatever their texts; found with texts that occur nowhere else."""
    messages = [{"role": role, "content": f"probe{number}x"} for number, role in enumerate(roles)]

    def text(messages: list[Message]) -> str | None:
        try:
            return template.render(messages)
        except InputError:  # of messages that the data has not
            return None

    plain = text(messages)
    if plain is None:
        return None
    places = [plain.find(message["content"]) for message in messages]
    if -1 in places:
        return f"drops {roles[places.index(-1)]} messages"
    if places != sorted(places):
        return "changes the order of the messages"
    seen = set()
    for number, message in enumerate(messages):
        before = messages[number - 1] if number else None
        kind = (before and before["role"], message["role"])
        if kind in seen:
            continue
        seen.add(kind)
        if message["role"] != "user" and text(_replaced(messages, number, message | {"role": "user"})) == plain:
            return f"writes {message['role']} messages as a user's"
        for gap in ("\n\n", "\n", " ", ""):
            if before is None:
                break
            both = message | {"content": f"{before['content']}{gap}{message['content']}"}
            if text(_replaced(messages, number, both, 2)) == plain:
                return f"writes {before['role']} and {message['role']} messages as one"
    return None


def _replaced(messages: list[Message], last: int, new: Message, count: int = 1) -> list[Message]:
    return [*messages[: last + 1 - count], new, *messages[last + 1 :]]


def changes(template: Template, rows: Rows) -> list[str]:
    """What the template drops or changes in the prompts of `rows`, with the number of rows: each in words.

    The roles of every row are looked at, the texts of up to SAMPLED rows, evenly spread.

    Raises:
        InputError: it refuses a row's roles, so the stage could not use the row.
    """
    prompts = [row["prompt"] for row in rows]
    roles = [("user",) if isinstance(prompt, str) else tuple(m["role"] for m in prompt) for prompt in prompts]
    for number in {pattern: number for number, pattern in enumerate(roles)}.values():
        template.render(messages_of(prompts[number]))
    general = {pattern: what for pattern in set(roles) if (what := _change_of_roles(template, pattern))}
    of_roles = Counter(general[pattern] for pattern in roles if pattern in general)
    looked = range(0, len(rows), -(-len(rows) // SAMPLED) or 1)
    texts = (template.change(messages_of(prompts[number])) for number in looked if roles[number] not in general)
    of_texts = Counter(found[0] for found in texts if found)
    sample = f"{len(looked):,} rows" + (" looked at" if len(looked) < len(rows) else "")
    return [f"{what} in {n:,} of {len(rows):,} rows" for what, n in of_roles.items()] + [
        f"{what} in {n:,} of {sample}" for what, n in of_texts.items()
    ]


def templates(folder: Path) -> tuple[str, dict[str, str]]:
    """(where they stand, {name: Jinja text}) of a tokenizer's folder; an only one is called "default".

    Files win over tokenizer_config.json, as in transformers.

    Raises:
        InputError: a file that cannot be read.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if found := {name: _read(path) for name, path in files.items() if path.is_file()}:
        return str(files["default"] if "default" in found else folder / "additional_chat_templates"), found
    kept = _settings(folder).get("chat_template")
    if isinstance(kept, list):
        kept = {entry.get("name"): entry.get("template") for entry in kept}
    named = kept if isinstance(kept, dict) else {"default": kept}
    return str(folder / "tokenizer_config.json"), {name: text for name, text in named.items() if text}


def choose(found: dict[str, str], wanted: str | None, where: str) -> str | None:
    """The template called `wanted` among those of a model, else its default; None where it has none at all.

    Raises:
        InputError: it has several and no default, so one must be asked for.
    """
    if wanted in found:
        return found[wanted]
    if found and "default" not in found:
        names = " or ".join(f"model.chat_template={name}" for name in sorted(found))
        raise InputError(
            f"{where} has the chat templates {', '.join(sorted(found))} and no default: say which: {names}"
        )
    return found.get("default")


def read_template(folder: Path, chat_template: str | None) -> tuple[str, str | None]:
    """(where it stands, its Jinja text or None) of `model.chat_template`, or else of a tokenizer's folder.

    Raises:
        InputError: model.chat_template is no Jinja text, no file that can be read and no name of one of the model's
            templates; or it is not given and the model has several.
    """
    where, found = templates(folder)
    if chat_template is None or chat_template in found:
        return where, choose(found, chat_template, where)
    return ("model.chat_template" if "{" in chat_template else chat_template), given_template(
        chat_template, list(found)
    )


def given_template(chat_template: str, names: list[str]) -> str:
    """The Jinja text of `model.chat_template`: of a text the text itself, of a file what stands in it.

    Args:
        names: of the templates the model has, for the message.

    Raises:
        InputError: it is neither.
    """
    if "{" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    if not path.is_file():
        more = f" (the model's own are called {', '.join(sorted(names))})" if len(names) > 1 else ""
        raise InputError(
            f"model.chat_template={short_repr(chat_template)[1:-1]}: neither a Jinja text nor a file{near_files(path)}: correct "
            f"the path{more}"
        )
    return _read(path)


def template_of(folder: Path, chat_template: str | None, told: str | None = None) -> Template | None:
    """The template that a stage renders with the tokenizer of `folder`; None: it has none.

    Args:
        told: model.template_date; None: the date that the folder keeps.

    Raises:
        InputError: see `read_template`.
    """
    where, text = read_template(folder, chat_template)
    if text is None:
        return None
    return Template(
        text, where, special_tokens(folder), (told or _settings(folder).get(DATE)) if ASKS in text else None
    )


def date_to_tell(folders: list[Path], chat_template: str | None, given: str | None, before: str | None) -> str | None:
    """The date that the templates of a stage's models are told: the one given, that of an earlier attempt, that of the
    run a model comes from, or today's. None where no template asks for one.

    Args:
        folders: of the tokenizers, that of the stage first.
        given: model.template_date.
        before: what an earlier attempt of the same run told.

    Raises:
        InputError: a date is given and no template asks for it.
    """
    if not any(ASKS in (read_template(folder, chat_template)[1] or "") for folder in folders):
        if given and folders:
            raise InputError(f"model.template_date={given}: the chat template asks for no date ({ASKS}): leave it out")
        return given
    kept = (_settings(folder).get(DATE) for folder in folders)
    return given or before or next(filter(None, kept), None) or date.today().isoformat()


def check_fits(rows: Rows, limit: int, name: str, folder: Path, template: Template | None) -> None:
    """Refuse rows that are all longer than `limit` tokens: the stage would leave out every one.

    Counts with the tokenizer.json of `folder`, up to the first row that fits; without that file nothing is checked.
    Special tokens that a tokenizer puts around plain text are not counted, and of a very long text only the beginning,
    so no row is thought longer than it is.

    Raises:
        InputError: with the shortest row's length.
    """
    if not (folder / "tokenizer.json").is_file():
        return
    tokenizer = load_tokenizer(folder)
    enough = 32 * limit  # letters: more than the longest tokens of any text

    def length(row: dict[str, Any]) -> int:
        prompt = row["prompt"]
        if template is not None:
            prompt = template.render(messages_of(prompt))
        elif not isinstance(prompt, str):
            raise InputError(
                f"{folder}: the tokenizer has no chat template, so messages cannot be encoded: set model.chat_template, or "
                "give plain text prompts"
            )
        fields = () if name == "max_prompt_length" else ("completion", "chosen", "rejected")
        answers = [row[field] for field in fields if field in row]
        count = [
            len(tokenizer.encode(text, add_special_tokens=False))
            for text in (prompt[:enough], *(a[:enough] for a in answers))
        ]
        return count[0] + (max(count[1:]) + 1 if answers else 0)  # 1: the end token

    shortest = None
    for row in rows:
        tokens = length(row)
        if tokens <= limit:
            return
        shortest = tokens if shortest is None else min(shortest, tokens)
    raise InputError(
        f"{name}={limit} tokens: all {len(rows)} rows are longer (the shortest has at least {shortest}): raise {name}, or give "
        "shorter rows"
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer.json of a folder.

    Raises:
        InputError: it is damaged, or something else.
    """
    path = folder / "tokenizer.json"
    return _read_tokenizer(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)  # the stages of a pipeline share one, and a large one takes a second
def _read_tokenizer(path: Path, changed: int) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"{path} is no tokenizer, or damaged ({' '.join(str(error).split())[:120]}): save it again with save_pretrained"
        ) from None


@lru_cache(maxsize=32)
def _compiled(template: str) -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant said; here it only passes it on, in a scope of its own."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> str:
            return caller()

    def refuse(message: str) -> NoReturn:
        from jinja2 import TemplateError

        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    jinja.filters["tojson"] = tojson
    jinja.globals["raise_exception"] = refuse
    del jinja.filters["random"], jinja.globals["lipsum"]  # the same text must have the same tokens every time
    return jinja.from_string(template)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: unreadable ({error}): expected UTF-8 text with a Jinja template") from None


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path, "save the tokenizer again with save_pretrained") if path.is_file() else {}


def special_tokens(folder: Path) -> tuple[tuple[str, str], ...]:
    """("eos_token", "</s>"), …: the special tokens that have a name, as transformers gives them to a template."""
    path = folder / "special_tokens_map.json"
    older = read_json(path, "save the tokenizer again with save_pretrained") if path.is_file() else {}
    found = {name: (older | _settings(folder)).get(name) for name in SPECIAL}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return tuple((name, text) for name, text in texts.items() if isinstance(text, str))
