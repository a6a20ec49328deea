"""The shape of a language model, read from its `config.json` alone: parameters, matrices, multiplications, cache.

No weights and no torch: a 70B model is counted on a laptop. Decoders of the Llama layout (embed → blocks of attention
and a gated MLP → norm → head) and GPT-2's are known; whatever else there is, is refused by name rather than guessed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.core.errors import InputError

# model_type -> what differs from Llama: biases of the attention's inputs, norms of a block, norms of a head's queries
# and keys ("head": head_dim each, "all": all heads at once), one matrix for q, k, v and one for gate and up.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "smollm3": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "gemma": {},
    "gemma2": {"norms": 4},
    "gemma3_text": {"norms": 4, "qk_norm": "head"},
    "olmo2": {"qk_norm": "all"},
    "phi3": {"fused": True},
    "gpt2": {},
}
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "gpt2", "smollm3")


# Bytes of a number in NF4 with double quantisation (arXiv 2305.14314, section 3): four bits, a scale of 8 bits for every 64,
# and for every 256 of those one of 32 bits.
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    positions: int = 0  # rows of a learned position table (GPT-2)
    attention_bias: bool = False  # on q, k, v
    output_bias: bool = False  # on the attention's output
    mlp_bias: bool = False
    norms: int = 2  # of a block
    norm_bias: bool = False
    qk_norm: int = 0  # numbers of a block's norms of queries and keys
    gated: bool = True  # gate and up, else one matrix up
    fused: bool = False
    stored: int = 4  # bytes a number in the checkpoint

    @classmethod
    def read(cls, config: dict[str, Any], where: str) -> Shape:
        """The shape a `config.json` describes.

        Raises:
            InputError: a key is missing, or the layout is another than the known ones.
        """
        kind = config.get("model_type", "")
        if kind not in FAMILIES:
            raise InputError(f"{where}: model_type={kind!r} is not among those counted here ({', '.join(FAMILIES)})")
        if kind == "gpt2":
            config = config | {
                "num_hidden_layers": config.get("n_layer"), "hidden_size": config.get("n_embd"),
                "num_attention_heads": config.get("n_head"),
                "intermediate_size": config.get("n_inner") or 4 * (config.get("n_embd") or 0),
            }  # fmt: skip
        keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
        if missing := [key for key in keys if not config.get(key)]:
            raise InputError(f"{where}: no {missing[0]} in it")
        family, heads = FAMILIES[kind], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        tied = config.get("tie_word_embeddings")
        gpt2, bias = kind == "gpt2", bool(config.get("attention_bias"))
        return cls(
            model_type=kind, layers=config["num_hidden_layers"], hidden=config["hidden_size"], heads=heads,
            kv_heads=kv_heads, head_dim=head_dim, intermediate=config["intermediate_size"], vocab=config["vocab_size"],
            tied=kind in TIED_BY_DEFAULT if tied is None else bool(tied),
            positions=(config.get("n_positions") or 1024) if gpt2 else 0,
            attention_bias=gpt2 or bias or family.get("qkv_bias", False), output_bias=gpt2 or bias,
            mlp_bias=gpt2 or bool(config.get("mlp_bias")), norms=family.get("norms", 2), norm_bias=gpt2,
            qk_norm={"head": 2 * head_dim, "all": (heads + kv_heads) * head_dim}.get(family.get("qk_norm", ""), 0),
            gated=not gpt2, fused=family.get("fused", False),
        )  # fmt: skip

    @property
    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """{name: (inputs, outputs, bias)} of a block's matrices, called as in the checkpoint."""
        d, f, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.model_type == "gpt2":
            return {
                "c_attn": (d, q + 2 * kv, True),
                "c_proj": (q, d, True),
                "c_fc": (d, f, True),
                "mlp.c_proj": (f, d, True),
            }
        if self.fused:
            return {
                "qkv_proj": (d, q + 2 * kv, False), "o_proj": (q, d, False),
                "gate_up_proj": (d, 2 * f, False), "down_proj": (f, d, False),
            }  # fmt: skip
        ins, out, mlp = self.attention_bias, self.output_bias, self.mlp_bias
        return {
            "q_proj": (d, q, ins), "k_proj": (d, kv, ins), "v_proj": (d, kv, ins), "o_proj": (q, d, out),
            "gate_proj": (d, f, mlp), "up_proj": (d, f, mlp), "down_proj": (f, d, mlp),
        }  # fmt: skip

    @property
    def block_matrix(self) -> int:
        """Numbers in a block's matrices: what a token is multiplied with."""
        return sum(i * o for i, o, _ in self.linears.values())

    def weight_bytes(self, number: int, nf4: bool) -> float:
        """Bytes of the model's weights, of `number` bytes each; with `nf4` the blocks' matrices take four bits and scales."""
        matrices = self.layers * self.block_matrix if nf4 else 0
        return matrices * NF4 + (self.parameters - matrices) * number

    @property
    def block(self) -> int:
        """Parameters of a block."""
        biases = sum(o for _, o, bias in self.linears.values() if bias)
        return self.block_matrix + biases + self.norms * self.hidden * (1 + self.norm_bias) + self.qk_norm

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding; the head has as many, and its own where it is not tied."""
        return self.vocab * self.hidden

    @property
    def trunk(self) -> int:
        """Parameters without an output embedding of its own."""
        return self.embedding + (self.positions + 1 + self.norm_bias) * self.hidden + self.layers * self.block

    @property
    def parameters(self) -> int:
        """Parameters of the causal language model."""
        return self.trunk + (0 if self.tied else self.embedding)

    def adapter(self, rank: int, targets: Any, last_layers: int | None) -> int:
        """Parameters of one LoRA adapter: rank x (inputs + outputs) a matrix (arXiv 2106.09685)."""
        wanted = None if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
        chosen = [
            rank * (i + o)
            for name, (i, o, _) in self.linears.items()
            if wanted is None or name in wanted or name.rsplit(".", 1)[-1] in wanted
        ]
        return (self.layers if last_layers is None else last_layers) * sum(chosen)

    def forward_flops(self, tokens: float, head_tokens: float, context: float, layers: int | None = None) -> float:
        """2 a weight and token, and 2 x heads x head_dim x context a token and block for causal attention.

        Args:
            tokens: through the blocks; `head_tokens` of them through the output embedding.
            context: mean length of the rows.
            layers: through so many blocks only.
        """
        blocks = self.layers if layers is None else layers
        each = 2 * self.block_matrix + 2 * self.heads * self.head_dim * context
        return blocks * each * tokens + 2 * self.embedding * head_tokens

    def kv_cache(self, tokens: float, dtype_bytes: int) -> float:
        """Bytes of keys and values of so many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes * tokens


def find_config(base: str) -> Path | None:
    """`config.json` of a model folder, or of a hub id that is in the cache of this machine; None where there is none."""
    if Path(base).is_dir():
        path = Path(base) / "config.json"
        return path if path.is_file() else None
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    found = sorted(cache.glob(f"models--{base.replace('/', '--')}/snapshots/*/config.json"), key=os.path.getmtime)
    return found[-1] if found else None


def read_shape(base: str) -> Shape:
    """The shape of the model at a folder or hub id.

    Raises:
        InputError: its config.json is not on this machine, or not understood.
    """
    path = find_config(base)
    if path is None:
        raise InputError(
            f"{base}: its config.json is not on this machine: give a folder that holds it, or fetch it once with "
            f"`hf download {base} config.json`"
        )
    try:
        return Shape.read(json.loads(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no JSON: {error}") from None
