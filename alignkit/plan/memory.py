"""Bytes a rank holds at the peak of each phase of a stage, from the model's shape and the config alone.

    weights      the models, once each; with LoRA one frozen base
    adapters     of every role that has one
    gradients    of what trains, as DeepSpeed keeps them
    optimizer    the float32 master copy, AdamW's two moments, and what a step needs besides
    activations  what a training forward keeps for its backward
    logits       and their gradient
    file         a checkpoint that is mapped into memory while it is read; host memory only
    heap         what the allocator holds beside the blocks in use; host memory only
    engine       vLLM's own copy of the weights
    kv_cache     keys and values of the answers that are being sampled
    libraries    a process with torch, DeepSpeed and the rest before it loads a model, and a CPU's bfloat16 kernels; host memory only

The formulas follow the code they speak of (torch's eager mode, transformers' Llama, DeepSpeed's ZeRO, TRL's fused head,
vLLM); `scripts/plan_vs_measured.py` compares them with real runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from alignkit.plan.shape import Shape

MIB, GIB = 2**20, 2**30
REDUCE_BUCKET = int(5e7)  # elements, see `engine._ZeRO.config`
LOSS_CHUNK = 2**24  # elements, see `algorithms.functional.CHUNK_ELEMENTS`
TILE = (4096, 32768)  # tokens x vocabulary of TRL's fused head
# Host memory of a process that has imported what its stage imports and joined its peers; measured of SFT: 415 MiB of
# its own and 195 MiB of mapped libraries.
LIBRARIES = 610 * MIB
VLLM_MODULES = 160 * MIB  # where the engine is in the process
# A CPU's bfloat16 products are compiled for every shape they meet, and kept: between 10 and 190 MiB in short runs.
KERNELS = 80 * MIB
# Bytes of heap a byte of a graph takes, with `launch.ALLOCATOR`: blocks of a graph leave gaps between them, more where graphs
# of two roles and of many lengths come and go. Measured on SmolLM2-135M: 1.0 to 1.3, and 1.4 to 2.2.
HEAP = {"sft": 1.2, "reward": 1.2, "ppo": 1.7}


@dataclass(frozen=True)
class Device:
    """What a rank runs on."""

    memory: float  # bytes of one GPU; without a GPU: of the machine, shared by its ranks
    gpu: bool

    def share(self, ranks: int) -> float:
        """Bytes there are for one rank."""
        return self.memory if self.gpu else self.memory / ranks


@dataclass
class Phase:
    """One phase and what is held at its peak, in bytes."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Roles:
    """How many models and adapters a stage holds, and what of them trains."""

    bases: int  # whole models in memory
    adapters: int
    trained: dict[str, int]  # {role: parameters that train}
    nf4: bool = False  # the bases are held in 4 bits


def number_bytes(cfg: Any) -> int:
    """Bytes of one number of the model."""
    return 2 if cfg.model.dtype == "bfloat16" else 4


def roles(cfg: Any, shape: Shape, starts_as_adapter: bool) -> Roles:
    """The models of a stage; `starts_as_adapter`: model.path is (or will be) an adapter, so the reference is one too."""
    lora = getattr(cfg, "finetune", None) is not None and cfg.finetune.name != "full"
    if cfg.stage in ("sample", "evaluate"):
        learned = sum(item.name == "reward_model" for item in cfg.rewards.values())
        return Roles((1 if cfg.stage == "sample" else 2) + learned, 0, {})
    size = shape.adapter(cfg.finetune.rank, cfg.finetune.target_modules, cfg.finetune.last_layers) if lora else 0
    nf4 = cfg.finetune.nf4
    if cfg.stage in ("sft", "reward"):
        head = shape.hidden if cfg.stage == "reward" else 0
        whole = shape.parameters if cfg.stage == "sft" else shape.trunk
        return Roles(1, int(lora), {"model": (size if lora else whole) + head}, nf4)
    learned = any(item.name == "reward_model" for item in cfg.rewards.values())
    critic = cfg.critic.resolved(cfg.finetune, learned) if cfg.algorithm.needs_critic else None
    head = shape.hidden + 1
    trained = {"policy": size if lora else shape.parameters}
    if critic is not None and critic.kind == "trunk":
        trained["policy"] += head
    elif critic is not None:
        trained["critic"] = (size if lora else shape.trunk) + head
    separate = critic is not None and critic.kind == "separate"
    if lora:
        return Roles(
            1 + separate,
            1 + starts_as_adapter + learned + (critic is not None and critic.kind != "trunk"),
            trained,
            nf4,
        )
    return Roles(2 + learned + separate, 0, trained)


def training(n: int, b: int, zero: int, ranks: int, largest: int) -> dict[str, float]:
    """Gradients, optimizer and the scratch space of a step, for `n` trained parameters of `b` bytes.

    ZeRO keeps a float32 master partition beside the weights (of float32 weights too), flattens a step's gradients into
    one float32 tensor and steps on it with temporaries of its size; plain AdamW goes tensor by tensor.
    """
    part = n / ranks
    if zero == 0 and b == 4:
        return {"gradients": 4 * n, "optimizer": 8 * n, "step": 2 * 4 * largest}
    if zero == 0:  # DeepSpeed's bf16 optimizer: float32 master and float32 sums of the gradients
        return {"gradients": 2 * n + 4 * n, "optimizer": 12 * part, "step": 4 * part}
    bucket = b * min(n, REDUCE_BUCKET) if ranks > 1 else 0
    return {"gradients": b * (n if zero == 1 else part) + bucket, "optimizer": 12 * part, "step": 2 * 4 * part}


def block_activations(shape: Shape, length: int, b: int, lora_rank: int | None) -> float:
    """Bytes a block keeps of a token for its backward, in rows of `length` slots of which some are padding.

    d hidden, q = heads x head_dim, f the MLP's width. Each norm keeps its float32 input and its output, which is the
    input of the matrices after it (and its result before the gain, where the gain trains); attention its query, key,
    value and output, with keys and values repeated to all heads, and a mask; the MLP the inputs and outputs of its
    activation, and their product.
    """
    d, q, f = shape.hidden, shape.heads * shape.head_dim, shape.intermediate
    norms = 2 * d * (4 + b + (b if lora_rank is None else 0)) + 8
    attention = 4 * q * b + 4 * shape.heads + length * b
    adapters = len(shape.linears) * (lora_rank or 0) * b
    return norms + attention + (4 if shape.gated else 3) * f * b + adapters


def activations(
    shape: Shape, rows: int, length: int, b: int, layers: int, lora_rank: int | None, checkpointing: bool
) -> float:
    """Bytes that `layers` trained blocks keep of `rows` rows, and what the block at work adds in its backward.

    With checkpointing each block keeps its input only, and one block at a time is whole.
    """
    tokens = rows * length
    block = tokens * block_activations(shape, length, b, lora_rank)
    at_work = tokens * 3 * shape.intermediate * b
    kept = layers * tokens * shape.hidden * b + block if checkpointing else layers * block
    return kept + at_work


def forward_only(shape: Shape, rows: int, length: int, b: int) -> float:
    """Bytes that are alive at once in a block without gradients: the residual, the MLP's gate, up and product."""
    return rows * length * (2 * shape.hidden + 3 * shape.intermediate) * b


def policy_logits(shape: Shape, rows: int, slots: int, b: int, gradient: bool) -> float:
    """Logits of the response slots, with their gradient, and a chunk of them upcast, as log-probs and as probabilities."""
    numbers = rows * slots * shape.vocab
    return numbers * b * (2 if gradient else 1) + 3 * 4 * min(numbers, LOSS_CHUNK)


def fused_head(shape: Shape, tokens: int, b: int, full: bool, gpu: bool) -> float:
    """TRL's fused head: a tile of logits, and the gradient of the head where it trains, summed in float32.

    Without Triton the tile's backward has seven float32 tensors of its size at once, and which logit is the target's.
    The tile itself is as wide as it can be for any vocabulary; what is not written to takes no host memory.
    """
    rows, width = min(tokens, TILE[0]), min(shape.vocab, TILE[1])
    head = shape.embedding * (4 + (b if b < 4 else 0)) if full else 0
    return rows * (TILE[1] * b if gpu else width * (b + 7 * 4 + 1)) + head


def predict(
    cfg: Any, shape: Shape, device: Device, prompt: int, length: int, adapter: bool = False, reward: Shape | None = None
) -> list[Phase]:
    """The phases of a stage and the bytes a rank holds at the peak of each.

    Args:
        reward: of a reward model that is held by itself beside the base; None: an adapter on it, or a model of its shape.
        prompt: longest prompt, tokens (ppo, sample, evaluate).
        length: longest row, tokens.
        adapter: the stage starts from an adapter.
    """
    phases = _phases(cfg, shape, device, prompt, length, adapter, reward)
    graph = max(phase.parts.get("activations", 0) for phase in phases)
    for phase in phases if cfg.stage in HEAP and not device.gpu else ():
        if phase.name == "step":  # a step's tensors are large, and mapped beside the heap that the graph has left
            phase.parts["heap"] = HEAP[cfg.stage] * graph
        else:
            phase.parts["heap"] = (HEAP[cfg.stage] - 1) * phase.parts.get("activations", 0)
    return phases


def _phases(
    cfg: Any, shape: Shape, device: Device, prompt: int, length: int, adapter: bool, reward: Shape | None
) -> list[Phase]:
    """`predict` without what the allocator adds."""
    held = roles(cfg, shape, adapter)
    b = number_bytes(cfg)
    in_process = cfg.stage not in ("sft", "reward") and cfg.rollout.name == "vllm"
    libraries = 0 if device.gpu else LIBRARIES + in_process * VLLM_MODULES + (KERNELS if b == 2 else 0)
    size = 0
    if held.adapters:
        size = shape.adapter(cfg.finetune.rank, cfg.finetune.target_modules, cfg.finetune.last_layers)
    weights = held.bases * shape.weight_bytes(b, held.nf4)
    if reward is not None:
        held, weights = _beside(cfg, held, weights, shape, reward)
    if cfg.deepspeed.stage == 3:  # of every rank its share, and the block at work and the embedding whole
        weights = weights / cfg.launcher.num_ranks + (2 * shape.block + shape.embedding) * b
    base: dict[str, float] = {"libraries": libraries, "weights": weights, "adapters": held.adapters * size * b}
    if held.nf4:  # the matrix at work is written out
        base["dequantised"] = max(inputs * outputs for inputs, outputs, _ in shape.linears.values()) * b
    # A checkpoint is mapped into memory while it is read; numbers of its own dtype then stay where they are.
    mapped = 0 if device.gpu or shape.stored == b else shape.parameters * shape.stored
    phases = [Phase("load", base | {"file": mapped})] if mapped else []
    if cfg.stage in ("sft", "reward"):
        return [
            *phases,
            *(Phase(name, base | parts) for name, parts in _trl(cfg, shape, held, length, device.gpu).items()),
        ]
    engine = rollout(cfg, shape, device, length)
    slots = length - prompt
    if cfg.rollout.name == "vllm" and not device.gpu:
        phases.append(Phase("start", base | {"engine": engine["engine"], "file": shape.parameters * shape.stored}))
    phases.append(Phase("generate", base | engine))
    if cfg.stage != "ppo":
        return phases
    states = [
        training(n, b, cfg.deepspeed.stage, cfg.launcher.num_ranks, shape.embedding) for n in held.trained.values()
    ]
    base |= {"optimizer": sum(state["optimizer"] for state in states)}
    lora = cfg.finetune.name != "full"
    layers = (cfg.finetune.last_layers or shape.layers) if lora else shape.layers
    rows = cfg.rollout_batch_size // cfg.launcher.num_ranks
    shared = 0
    if lora and cfg.keep_shared_states and layers < shape.layers:
        shared = rows * length * shape.hidden * b
    micro = min(cfg.micro_batch_size, rows)
    for phase in phases[-2:] if cfg.rollout.name == "vllm" else phases[-1:]:
        phase.parts |= {"optimizer": base["optimizer"]}
    if device.gpu and getattr(cfg.rollout, "sleep", False):
        engine = {}  # vLLM gives its memory back until the next rollouts
    phases.append(
        Phase("forward", base | engine | {
            "activations": forward_only(shape, micro, length, b) + shared,
            "logits": policy_logits(shape, micro, slots, b, gradient=False),
        })
    )  # fmt: skip
    phases.append(
        Phase("update", base | engine | {
            "gradients": sum(state["gradients"] for state in states),
            "activations": activations(shape, micro, length, b, layers, cfg.finetune.rank if lora else None, False) + shared * cfg.launcher.num_ranks,
            "logits": policy_logits(shape, micro, slots, b, gradient=True),
        })
    )  # fmt: skip
    phases.append(
        Phase("step", base | engine | {
            "gradients": sum(state["gradients"] for state in states),
            "optimizer": base["optimizer"] + max(state["step"] for state in states),
        })
    )  # fmt: skip
    folded = lora and engine and cfg.rollout.name == "vllm" and not device.gpu
    if folded:
        phases.append(Phase("sync", base | engine | {"folded": layers * shape.block_matrix * b}))
    return phases


def _beside(cfg: Any, held: Roles, weights: float, shape: Shape, reward: Shape) -> tuple[Roles, float]:
    """What a stage holds where its reward model is a model of another shape: it counts as an adapter or as a base before."""
    b = number_bytes(cfg)
    if cfg.stage == "ppo" and cfg.finetune.name != "full":
        return replace(held, adapters=held.adapters - 1), weights + reward.trunk * b
    return replace(held, bases=held.bases - 1), weights + (reward.trunk - shape.parameters) * b


def _trl(cfg: Any, shape: Shape, held: Roles, length: int, gpu: bool) -> dict[str, dict[str, float]]:
    """{phase: what the two TRL stages hold beside the weights}; the graph is gone before the optimizer steps."""
    b, ranks, (n,) = number_bytes(cfg), cfg.launcher.num_ranks, held.trained.values()
    lora = cfg.finetune.name != "full"
    layers = (cfg.finetune.last_layers or shape.layers) if lora else shape.layers
    rows = cfg.micro_batch_size * (2 if cfg.stage == "reward" else 1)
    state = training(n, b, cfg.deepspeed.stage, ranks, shape.embedding)
    graph = activations(shape, rows, length, b, layers, cfg.finetune.rank if lora else None, cfg.gradient_checkpointing)
    logits = fused_head(shape, rows * length, b, not lora, gpu) if cfg.stage == "sft" else 0
    return {
        "train": {
            "gradients": state["gradients"],
            "optimizer": state["optimizer"],
            "activations": graph,
            "logits": logits,
        },
        "step": {"gradients": state["gradients"], "optimizer": state["optimizer"] + state["step"]},
    }


def rollout(cfg: Any, shape: Shape, device: Device, length: int) -> dict[str, float]:
    """What the engine that samples adds to a rank."""
    b, ranks = number_bytes(cfg), cfg.launcher.num_ranks
    weights = shape.parameters * b
    if cfg.rollout.name == "vllm" and device.gpu:
        pool = cfg.rollout.gpu_memory_utilization * device.memory
        return {"engine": weights, "kv_cache": max(0.0, pool - weights)}
    if (
        cfg.rollout.name == "vllm"
    ):  # its oneDNN packs each matrix in place of the weights, a tied head beside the embedding
        weights += shape.embedding * b if shape.tied else 0
        return {"engine": weights, "kv_cache": max(1, round(cfg.rollout.kv_cache_gib)) * GIB}
    if cfg.rollout.name == "hf":
        rows = getattr(cfg, "rollout_batch_size", 32 * cfg.group_size * ranks) // ranks
        return {"kv_cache": shape.kv_cache(rows * length, b), "engine": 4 * 4 * rows * shape.vocab}
    return {}
