"""Chat templates and token counts without transformers: for checks on the command line, before anything starts.

Jinja is set up as transformers sets it up, so a template that fails here fails on the ranks. What trains and scores is
encoded by `tokens.py` alone.
"""

from __future__ import annotations

import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from alignkit.artifacts import read_json
from alignkit.types import InputError, Message, Rows

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_template(folder: Path, chat_template: str | None) -> tuple[str, str | None]:
    """(where it stands, its Jinja text or None) of `model.chat_template`, or else of a tokenizer's folder.

    Raises:
        InputError: model.chat_template is neither a Jinja text nor a file that can be read.
    """
    if chat_template is not None:
        if "{" in chat_template:
            return "model.chat_template", chat_template
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise InputError(f"model.chat_template={chat_template}: neither a Jinja text nor a file: correct the path")
    else:
        path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return str(path), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: unreadable ({error}): expected UTF-8 text with a Jinja template") from None
    found = _settings(folder).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    return str(folder / "tokenizer_config.json"), found


def render(template: str, messages: list[Message], where: str, key: str, folder: Path | None = None) -> str:
    """The text of `messages` with the generation prompt, as the chat template writes it.

    Raises:
        InputError: the template does not compile, or refuses the messages.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokens = {name: token for name, token in _special_tokens(folder).items() if token is not None}
        return _compiled(template).render(messages=messages, add_generation_prompt=True, **tokens)
    except TemplateSyntaxError as error:
        raise InputError(
            f"{key}: the chat template {where} has a syntax error in line {error.lineno}: {error.message}: mend that line, "
            "or set model.chat_template to another"
        ) from None
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"{key}: the chat template {where} refuses messages of {roles}: {' '.join(str(error).split())}: change the "
            "messages, or set model.chat_template to another"
        ) from None


def check_fits(rows: Rows, limit: int, name: str, folder: Path, chat_template: str | None) -> None:
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
    where, template = read_template(folder, chat_template)

    enough = 32 * limit  # letters: more than the longest tokens of any text

    def length(row: dict[str, Any]) -> int:
        prompt = row["prompt"]
        if template is not None:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompt = render(template, messages, where, "data", folder)
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


def _compiled(template: str) -> Any:
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant said; here it only passes it on."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        from jinja2 import TemplateError

        raise TemplateError(message)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    jinja.filters["tojson"] = lambda x, indent=None, **_: json.dumps(x, ensure_ascii=False, indent=indent)
    jinja.globals["raise_exception"] = refuse
    jinja.globals["strftime_now"] = time.strftime
    return jinja.from_string(template)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path, "save the tokenizer again with save_pretrained") if path.is_file() else {}


def _special_tokens(folder: Path | None) -> dict[str, Any]:
    settings = _settings(folder) if folder is not None else {}
    found = {name: settings.get(name) for name in SPECIAL}
    return {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
