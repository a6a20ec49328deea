"""Base models, heads and what is read off them: log-probs, entropies, values and scores of responses.

The only shift of logits in the code is `response_hidden`: the token in slot i is predicted by the state in slot i - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.errors import InputError, RunError
from alignkit.core.types import ModelSource
from alignkit.models import architectures, loaded, quantization, score_heads
from alignkit.models.config import Model
from alignkit.models.loaded import copy_adapter
from alignkit.models.score_heads import load_head
from alignkit.training import saving

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def load_base(
    path: str,
    model: Model,
    vocab: int,
    auto_class: str = "AutoModelForCausalLM",
    nf4: bool = False,
    headless: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A transformers model without dropout, safetensors only, its embedding grown to `vocab` rows where it has fewer.

    Args:
        nf4: its linear layers are held in 4 bits (arXiv 2305.14314), all but the output layer, and computed in model.dtype.
        headless: only its states are used (a whole reward model), so its output layer may be missing.

    Raises:
        InputError: a weight does not come from the files, or the tokenizer is not the embedding's.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    for line in architectures.refusals(config.to_dict(), path):  # a hub id is looked at here first
        raise InputError(line)
    for key in [k for k in config.to_dict() if k.endswith(("dropout", "_pdrop", "drop_rate"))]:
        if isinstance(getattr(config, key, None), float):
            setattr(config, key, 0.0)
    for key, value in kwargs.items():
        setattr(config, key, value)
    hf, info = architectures.auto_class(auto_class, config).from_pretrained(
        path,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # said below, by name
        dtype=getattr(torch, model.dtype),
        use_safetensors=True,
        trust_remote_code=model.trust_remote_code,
        **architectures.attention(config),
        **(quantization.arguments(model.dtype) if nf4 else {}),
    )
    loaded.check_base(hf, info, path, headless or auto_class != "AutoModelForCausalLM")
    quantization.keep_gradients(hf)
    hf.trained_rows = hf.get_input_embeddings().weight.shape[0]  # rows added for a pad token are never emitted
    loaded.check_rows(vocab, hf.trained_rows, path)
    if vocab > hf.trained_rows:
        hf.resize_token_embeddings(vocab, mean_resizing=False)
    hf.config.use_cache = False
    saving.unset_unwritable(hf)
    disable_dropout(hf)
    return hf


def is_cut(module: nn.Module) -> bool:
    """Whether ZeRO-3 has cut the parameters of `module` up: forwards gather them, so every rank must run as many."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def disable_dropout(module: nn.Module) -> None:
    """Set every nn.Dropout to 0: ratios of log-probs compare the same function twice."""
    from torch import nn

    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def train_only(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Freeze all but `parameters`, and check that no dropout is left.

    Raises:
        RunError: a dropout is on; old and new log-probs would be those of two functions.
    """
    from torch import nn

    module.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    noisy = [name for name, part in module.named_modules() if isinstance(part, nn.Dropout) and part.p > 0]
    if noisy:
        raise RunError(f"{len(noisy)} dropout layers are on, as {noisy[0]}: PPO needs a model without dropout")


def position_ids(mask: Tensor) -> Tensor:
    """[B, L] bool -> [B, L] i64: 0, 1, 2, … over the valid slots, wherever the padding is (lm-human-preferences)."""
    mask = mask.long()
    return (mask.cumsum(1) - mask).clamp(min=0)


def trunk_hidden(hf: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states [B, L, d]. Padded ids are replaced by 0 and never attended."""
    ids = ids.masked_fill(~mask, 0)
    return _base_forward(hf, mask, input_ids=ids)


def _base_forward(hf: PreTrainedModel, mask: Tensor, **inputs: Tensor) -> Tensor:
    return hf.base_model(
        attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False, **inputs
    ).last_hidden_state


@contextmanager
def only_blocks(hf: PreTrainedModel, first: int, last: int, norm: bool) -> Iterator[None]:
    """Inside, `hf` runs its decoder blocks first..last-1 only, and its final norm or not."""
    from torch import nn

    base = hf.base_model
    layers, final = base.layers, base.norm
    base.layers, base.norm = layers[first:last], final if norm else nn.Identity()
    try:
        yield
    finally:
        base.layers, base.norm = layers, final


def shared_blocks(hf: PreTrainedModel) -> int:
    """How many leading decoder blocks hold no adapter, so that every role of a shared model computes them alike.

    0 where the model's layout is another than embed → layers → norm; found out by trying: the two halves, one after
    the other, must give the states of the whole, bit for bit.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = hf.base_model
    if (
        not all(hasattr(base, name) for name in ("layers", "norm"))
        or len(set(getattr(hf.config, "layer_types", None) or [0])) > 1
    ):
        return 0  # blocks of several kinds are told apart by their number, which the upper half would count from 0
    adapted = [any(isinstance(m, BaseTunerLayer) for m in block.modules()) for block in base.layers]
    count = adapted.index(True) if True in adapted else 0
    if count == 0:
        return 0
    with torch.no_grad():
        ids = torch.arange(1, 9, device=hf.device)[None]
        mask = torch.ones_like(ids, dtype=torch.bool)
        with only_blocks(hf, 0, count, norm=False):
            lower = _base_forward(hf, mask, input_ids=ids)
        with only_blocks(hf, count, len(base.layers), norm=True):
            halves = _base_forward(hf, mask, inputs_embeds=lower)
        return count if torch.equal(halves, trunk_hidden(hf, ids, mask)) else 0


def response_hidden(hidden: Tensor, starts: Tensor, response_slots: int) -> Tensor:
    """[B, L, d] -> [B, Lr, d]: the states that predict the response tokens (and hold the values before them).

    `starts` [B] i64: the slot of each row's first response token.
    """
    at = _response_slots(starts, response_slots, hidden.shape[1], shift=-1)
    return hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[2]))


def _response_slots(starts: Tensor, response_slots: int, length: int, shift: int = 0) -> Tensor:
    """[B, Lr] i64: where the response tokens are, `shift` slots on; past the end of the row: its last slot."""
    import torch

    at = starts[:, None] + torch.arange(shift, response_slots + shift, device=starts.device)
    return at.clamp(min=0, max=length - 1)


def last_valid(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, L, d], [B, L] -> [B, d]: the state of the last valid token of every row."""
    import torch

    slots = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, slots, -1).amax(dim=1).clamp(min=0)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


def make_roles(
    models: dict[str, PreTrainedModel],
    heads: dict[str, nn.Linear],
    switch: Callable[[str], None],
    trunk_critic: bool = False,
) -> nn.Module:
    """Policy, ref_policy, critic and reward_model as one module, the thing that trains.

    Args:
        models: {role: transformers causal LM}; the same object may serve several roles.
        heads: {"critic" | "reward_model": scalar head}.
        switch: called with the role before each forward; makes a shared model compute with that role's weights.
        trunk_critic: values come from a head on the policy's own states, so "critic" is no role of its own.

    The module's `forward(role, ids, mask, starts, response_slots, temperature=1.0, entropy=False, lower=None)` takes ids
    [B, L] i64, mask [B, L] bool and starts [B] i64 (the slot of the first response token), and returns by role
      policy, ref_policy: (log-probs of the response tokens [B, Lr] f32, their entropies [B, Lr] f32 or None, the trunk
                          critic's values [B, Lr] f32 or None),
      critic: values [B, Lr] f32, each before its response token,
      reward_model: scores [B] f32, read at the last valid token.
    `lower` is what `shared(ids, mask)` gave: the states after the blocks that no role adapts, computed once for all
    roles (None where there are none, or where each role has a model of its own).
    """
    import torch
    from torch import nn

    from alignkit.algorithms import functional as F

    for role, head in heads.items():
        loaded.check_width(role, head, models[role if role in models else "policy"])

    class Roles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.role_of: dict[str, int] = {}
            unique: list[PreTrainedModel] = []
            for role, hf in models.items():
                known = [i for i, other in enumerate(unique) if other is hf]
                self.role_of[role] = known[0] if known else len(unique)
                unique += [] if known else [hf]
            self.models = nn.ModuleList(unique)
            self.heads = nn.ModuleDict(heads)
            for head in heads.values():  # called as modules, so that ZeRO-3 gathers their weights
                head.forward = partial(apply_head, head)
            self.trunk_critic = trunk_critic
            self.ends: list[int] = []  # ids that end a response; the reward model was trained on the first
            sharing = list(self.role_of.values()).count(0)
            self.blocks = shared_blocks(unique[0]) if sharing > 1 else 0

        def model(self, role: str) -> PreTrainedModel:
            return self.models[self.role_of[role]]

        def switch(self, role: str) -> None:
            switch(role)

        def shared(self, ids, mask):
            if not self.blocks:
                return None
            hf = self.models[0]
            with torch.no_grad(), only_blocks(hf, 0, self.blocks, norm=False):
                return trunk_hidden(hf, ids, mask)

        def forward(self, role, ids, mask, starts, response_slots, temperature=1.0, entropy=False, lower=None):
            switch(role)
            hf = self.model(role)
            if role == "reward_model" and len(self.ends) > 1:
                read = F.with_one_end(ids, mask, self.ends)
                ids, lower = read, (None if is_cut(hf) or not torch.equal(read, ids) else lower)
            if lower is None or self.role_of[role] != 0:
                hidden = trunk_hidden(hf, ids, mask)
            else:
                with only_blocks(hf, self.blocks, len(hf.base_model.layers), norm=True):
                    hidden = _base_forward(hf, mask, inputs_embeds=lower)
            if role == "reward_model":
                return self.heads[role](last_valid(hidden, mask))
            hidden = response_hidden(hidden, starts, response_slots)
            if role == "critic":
                return self.heads[role](hidden)
            logits = architectures.logits_of(hf, hidden)[..., : hf.trained_rows]
            at = _response_slots(starts, response_slots, ids.shape[1])
            labels = ids.gather(1, at).masked_fill(~mask.gather(1, at), 0)
            logprobs = F.response_logprobs(logits, labels, temperature)
            values = self.heads["critic"](hidden) if self.trunk_critic and role == "policy" else None
            return logprobs, (F.entropy(logits, temperature) if entropy else None), values

    return Roles()


def apply_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Scalar head in float32 (float64 where the states are): [..., d] -> [...]."""
    import torch
    from torch.nn.functional import linear

    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bias = None if head.bias is None else head.bias.to(dtype)
    return linear(hidden.to(dtype), head.weight.to(dtype), bias).squeeze(-1)


def named_weights(hf: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight as its checkpoint names it, tied copies once, those in 4 bits as they are computed with."""
    return architectures.checkpoint_names(hf, held_weights(hf))


def held_weights(hf: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The same, as the module names them."""
    packed = {f"{name}.weight": layer for name, layer in quantization.layers(hf).items()}
    tied = set(getattr(hf, "_tied_weights_keys", None) or ()) if hf.config.tie_word_embeddings else set()
    embeddings = {p.data_ptr() for m in (hf.get_input_embeddings(), hf.get_output_embeddings()) for p in m.parameters()}
    for name, tensor in hf.state_dict().items():
        if name in packed:
            yield name, quantization.dense_weight(packed[name])
        elif name not in tied and ".weight." not in name:  # "….weight.absmax" and the like: of a weight in 4 bits
            vocabulary = tensor.data_ptr() in embeddings
            yield name, tensor[: hf.trained_rows] if vocabulary else tensor


def load_policy(source: ModelSource, model: Model, vocab: int) -> PreTrainedModel:
    """A whole causal LM for inference, its adapter (if any) folded in."""
    hf = quantization.written_out(load_base(source.base, model, vocab, nf4=source.nf4))
    if source.adapter is not None:
        from peft import PeftModel

        peft = PeftModel.from_pretrained(hf, source.adapter, autocast_adapter_dtype=False)
        loaded.check_adapter(peft, source.adapter, "default")
        hf = peft.merge_and_unload()
    return hf.requires_grad_(False)


def continue_adapter(hf: PreTrainedModel, adapter: Path) -> Any:
    """`hf` with a trainable copy of a trained adapter."""
    from peft import PeftModel

    peft = PeftModel.from_pretrained(hf, adapter, is_trainable=True, autocast_adapter_dtype=False)
    loaded.check_adapter(peft, adapter, "default")
    return quantization.keep_dtype(peft)


def new_adapter(hf: PreTrainedModel, peft_config: Any) -> Any:
    """`hf` with a fresh adapter in the base's dtype."""
    from peft import get_peft_model

    return quantization.keep_dtype(get_peft_model(hf, peft_config, autocast_adapter_dtype=False))


def adapt_for_scores(hf: PreTrainedModel, peft_config: Any, start: Path | None) -> Any:
    """A sequence classifier with a LoRA adapter and a trained head; the adapter starts as the one in `start`, if any."""
    if start is not None:
        saved = type(peft_config).from_pretrained(start)  # the shape of the adapter that it continues
        saved.task_type, saved.inference_mode, saved.lora_dropout = (
            peft_config.task_type,
            False,
            peft_config.lora_dropout,
        )
        saved.base_model_name_or_path = hf.config._name_or_path
        peft_config = saved
    peft = new_adapter(hf, peft_config)
    if start is not None:
        copy_adapter(peft, start, "default")
    return peft


def single_role(hf: PreTrainedModel) -> nn.Module:
    """A roles module with nothing but a policy, for stages that only sample and score."""
    return make_roles({"policy": hf}, {}, switch=lambda role: None)


def load_scorer(
    source: ModelSource, model: Model, vocab: int, merged: bool = False
) -> tuple[PreTrainedModel, nn.Linear]:
    """The trunk of a reward model and its head: a run of ours, or one of transformers, TRL or PEFT.

    Args:
        merged: fold an adapter in where it could stay beside the base, for weights that train.

    Raises:
        InputError: it has no scalar head, or its adapter is not that of the base.
    """
    import transformers

    source = score_heads.fetched(source)
    head, classifier = load_head(source), "AutoModelForSequenceClassification"
    if source.adapter is None:  # a sequence classifier has no output embedding to load
        config = transformers.AutoConfig.from_pretrained(source.base, trust_remote_code=model.trust_remote_code)
        if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            return load_base(source.base, model, vocab, classifier, num_labels=1), head
        return load_base(source.base, model, vocab, headless=True), head
    if score_heads.find(source).ours:
        from peft import LoraConfig, get_peft_model

        hf = quantization.written_out(load_base(source.base, model, vocab, nf4=source.nf4))
        config = LoraConfig.from_pretrained(str(source.adapter))
        config.task_type, config.modules_to_save = "CAUSAL_LM", None
        peft = get_peft_model(hf, config, autocast_adapter_dtype=False)
        copy_adapter(peft, source.adapter, "default")
        return peft.merge_and_unload(), head
    peft = score_heads.whole_adapter(load_base(source.base, model, vocab, classifier, num_labels=1), source.adapter)
    disable_dropout(peft)
    return (peft.merge_and_unload() if merged else peft.get_base_model()), head


def load_reward(source: ModelSource, model: Model, vocab: int) -> nn.Module:
    """A reward model as a roles module whose only role is reward_model."""
    hf, head = load_scorer(source, model, vocab)
    return make_roles({"reward_model": hf}, {"reward_model": head}, switch=lambda role: None).requires_grad_(False)
