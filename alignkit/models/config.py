"""A language model as the config says it: where it is and how it is held."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from alignkit.core.errors import InputError
from alignkit.core.fields import check_date


@dataclass
class Model:
    """A language model: where it is and how it is held."""

    path: str = MISSING  # hub id, folder, a finished run (runs/<name>/sft) or demo:smollm2-135m-instruct
    dtype: str = "float32"  # float32 | bfloat16
    trust_remote_code: bool = False  # run Python code that comes with the model
    chat_template: str | None = None  # a file with a Jinja template, or the name of one of the model's; None: its own
    template_date: str | None = None  # YYYY-MM-DD that a chat template is told; None: of the model's run, else today

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"model.dtype={self.dtype!r}: expected float32 or bfloat16")
        check_date("model.template_date", self.template_date)
