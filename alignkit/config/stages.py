"""The typed configuration of every stage: the only home of defaults, strict keys and cross-field checks.

A config node is the component itself. The folders `algorithms`, `rollout`, `rewards`, `finetune` and `launch` hold
one dataclass a file; each dataclass with a line `name: str = ...` is an option of the Hydra group called like its folder
(`deepspeed` and `logger` options live in `zero.py` and `log.py`). A new file is a new option.

`register()` tells Hydra, `to_config()` turns what Hydra composed into objects, `save()` and `load()` keep them in
`<run_dir>/config.yaml`, the only thing a rank reads.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from alignkit.config import credentials
from alignkit.config.messages import divides, nearest_key, one_line, stray_keys, texts
from alignkit.config.names import check_length, check_run_name
from alignkit.config.rules import contradictions
from alignkit.config.settings import computed_from
from alignkit.core import foreign
from alignkit.core.errors import InputError
from alignkit.core.fields import SEEDS, check_numbers, num
from alignkit.data.dataset import Data, Kind, Ptx
from alignkit.finetune.critic import Critic
from alignkit.models.config import Model
from alignkit.training.engine import Optimizer

# Hydra group -> where its options are defined.
GROUPS = {
    "algorithm": "alignkit.algorithms",
    "rollout": "alignkit.rollout",
    "reward": "alignkit.rewards",
    "finetune": "alignkit.finetune",
    "launcher": "alignkit.launch",
    "deepspeed": "alignkit.training.zero",
    "logger": "alignkit.tracking.run_log",
}


@dataclass
class Stage:
    """What every stage is told."""

    run_name: str = MISSING  # folder under runs_dir: letters and digits of any language, "-_.=,", "/" between parts
    runs_dir: str = "runs"  # where run folders are made
    seed: int = num(0, ge=0, le=SEEDS)  # of data order, sampling, dropout and new weights
    dry_run: bool = False  # print the resolved config and the launch command, start nothing
    resume: bool = False  # a finished run of this name is kept; an unfinished one goes on from its newest checkpoint
    reuse: bool = False  # link to a finished stage of the same config and inputs under runs_dir, if there is one
    verify: str = "auto"  # auto | full: runs that are read, by size and time and then by hash | by every byte
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    deepspeed: Any = MISSING
    launcher: Any = MISSING
    logger: Any = MISSING

    stage: ClassVar[str] = ""
    row_kind: ClassVar[Kind] = "prompt"
    groups: ClassVar[tuple[str, ...]] = ("deepspeed", "launcher", "logger")

    @property
    def run_dir(self) -> Path:
        """`<runs_dir>/<run_name>/<stage>`."""
        return Path(self.runs_dir) / self.run_name / self.stage

    def check(self) -> None:
        """Raise InputError where two fields contradict each other; see the stages below."""
        self.launcher.check()
        if not self.runs_dir:
            raise InputError("runs_dir='': expected a folder, as runs")
        check_run_name(self.run_name)
        check_length(self.run_dir)
        self.deepspeed.check(self.model.dtype)

    def inputs(self) -> dict[str, str]:
        """{role: path} of models and runs this stage reads, resolved and checked before anything starts."""
        return {"model": self.model.path}

    def row_sets(self) -> list[tuple[Data, Kind, str, int]]:
        """(data, kind, key of its longest row, that length in tokens) of all rows this stage reads."""
        return [(self.data, self.row_kind, "max_prompt_length", getattr(self, "max_prompt_length", 0))]


@dataclass
class Resumable(Stage):
    """What a stage with checkpoints is told beside."""

    save_steps: int = num(0, ge=0)  # steps from checkpoint to checkpoint; 0: one where a signal or a deadline stops it
    keep_last: int = num(2, ge=1)  # checkpoints kept
    keep_best: str | None = None  # beside them the best by this metric, as objective/score ("-<metric>": the lowest)
    max_seconds: float = num(0, ge=0)  # save and stop with exit code 75 before so many seconds have passed; 0: no limit


@dataclass
class TrainStage(Resumable):
    """What a stage trained by TRL is told beside."""

    finetune: Any = MISSING
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=2e-4))
    eval_data: Data = field(default_factory=lambda: Data(path=""))  # held-out rows; path "" holds out eval_fraction
    eval_fraction: float = num(0.1, ge=0, lt=1)  # of the rows, split by prompt, when eval_data.path is empty
    max_length: int = num(512, ge=2)  # tokens of prompt + response; longer rows are left out and counted
    epochs: float = num(1.0, gt=0)  # passes over the rows
    max_steps: int = num(-1, ge=-1)  # optimizer steps; -1: as many as `epochs` makes
    mini_batch_size: int = num(16, ge=1)  # sequences (pairs) of one optimizer step, over all ranks
    micro_batch_size: int = num(8, ge=1)  # sequences (pairs) of one forward on one device
    gradient_checkpointing: bool = False  # less memory for a third more compute

    groups: ClassVar[tuple[str, ...]] = ("deepspeed", "launcher", "logger", "finetune")

    def row_sets(self) -> list[tuple[Data, Kind, str, int]]:
        return [(data, self.row_kind, "max_length", self.max_length) for data in (self.data, self.eval_data)]

    def check(self) -> None:
        super().check()
        self.finetune.check(self)
        ranks = self.launcher.num_ranks
        divides("mini_batch_size", self.mini_batch_size, micro_batch_size=self.micro_batch_size, ranks=ranks)


@dataclass
class SFT(TrainStage):
    """Supervised fine-tuning on prompts and completions; the loss counts completion tokens and the end token."""

    neftune_noise_alpha: float | None = num(None, gt=0)  # noise on the embeddings (arXiv 2310.05914), None: off

    stage: ClassVar[str] = "sft"
    row_kind: ClassVar[Kind] = "sft"


@dataclass
class Reward(TrainStage):
    """Reward model: pairwise (Bradley-Terry) loss on chosen and rejected responses."""

    center_coef: float | None = num(None, ge=0)  # weight of (r_chosen + r_rejected)^2, keeps scores near 0; None: off
    normalize: str = "mean"  # of the held-out scores: mean (to 0) | mean_std (to 0 and 1) | none

    def check(self) -> None:
        super().check()
        if self.normalize not in ("mean", "mean_std", "none"):
            raise InputError(f"normalize={self.normalize!r}: expected mean, mean_std or none")

    stage: ClassVar[str] = "reward"
    row_kind: ClassVar[Kind] = "preference"


@dataclass
class Sample(Stage):
    """Sample answers, score them, write chosen/rejected pairs to `<run_dir>/pairs.jsonl`."""

    rollout: Any = MISSING
    rewards: dict[str, Any] = field(default_factory=dict)  # {name: reward}: the score that ranks the answers
    group_size: int = num(4, ge=2)  # answers a prompt
    pairs_per_prompt: int = num(1, ge=1)  # best with worst, second best with second worst, …
    max_prompt_length: int = num(256, ge=1)  # tokens; longer prompts are left out and counted
    min_margin: float = num(0.0, ge=0)  # a pair needs best score - worst score above this
    finished_only: bool = True  # pairs are made of answers that ended by themselves

    stage: ClassVar[str] = "sample"
    groups: ClassVar[tuple[str, ...]] = ("deepspeed", "launcher", "logger", "rollout")

    def check(self) -> None:
        super().check()
        _some_reward(self)
        self.rollout.check()
        if not 1 <= self.pairs_per_prompt <= self.group_size // 2:
            raise InputError(
                f"pairs_per_prompt={self.pairs_per_prompt} with group_size={self.group_size}: expected 1 to {self.group_size // 2}, "
                "since every pair takes two answers"
            )

    def inputs(self) -> dict[str, str]:
        return super().inputs() | _reward_inputs(self)


@dataclass
class PPO(Resumable):
    """Proximal policy optimisation against a reward."""

    finetune: Any = MISSING
    algorithm: Any = MISSING
    rollout: Any = MISSING
    rewards: dict[str, Any] = field(default_factory=dict)  # {name: reward}, summed with their weights
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-4, schedule="linear"))
    critic_optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-4, schedule="linear"))
    critic: Critic = field(default_factory=Critic)
    ptx: Ptx = field(default_factory=Ptx)
    steps: int = num(100, ge=1)  # rollout-and-update rounds
    rollout_batch_size: int = num(64, ge=1)  # sequences of one round, over all ranks
    mini_batch_size: int = num(32, ge=1)  # sequences of one optimizer step, over all ranks
    micro_batch_size: int = num(8, ge=1)  # sequences of one forward on one device
    group_size: int = num(1, ge=1)  # responses a prompt
    max_prompt_length: int = num(256, ge=1)  # tokens; longer prompts are left out and counted
    gradient_checkpointing: bool = False  # less memory for a third more compute, in the update
    keep_shared_states: bool = True  # of a round, after the blocks no role adapts: B x (Lp + Lr) x hidden numbers
    sample_every: int = num(1, ge=1)  # write some rollouts to samples.jsonl every so many steps

    stage: ClassVar[str] = "ppo"
    groups: ClassVar[tuple[str, ...]] = ("deepspeed", "launcher", "logger", "finetune", "algorithm", "rollout")

    def check(self) -> None:
        super().check()
        _some_reward(self)
        if self.mini_batch_size > self.rollout_batch_size:
            raise InputError(
                f"mini_batch_size={self.mini_batch_size} > rollout_batch_size={self.rollout_batch_size}: an optimizer step "
                "cannot use more sequences than a rollout round makes; lower mini_batch_size"
            )
        ranks = self.launcher.num_ranks
        divides("rollout_batch_size", self.rollout_batch_size, mini_batch_size=self.mini_batch_size)
        divides("rollout_batch_size", self.rollout_batch_size, group_size=self.group_size, ranks=ranks)
        divides("mini_batch_size", self.mini_batch_size, micro_batch_size=self.micro_batch_size, ranks=ranks)
        self.finetune.check(self)
        self.critic.check(self.finetune, any(item.name == "reward_model" for item in self.rewards.values()))
        warmup = getattr(self.algorithm, "critic_warmup", 0)
        if warmup and self.critic.kind == "trunk":
            raise InputError(
                f"algorithm.critic_warmup={warmup} with critic.kind=trunk: a critic on the policy's states cannot learn alone"
            )
        self.ptx.check()
        if self.ptx.coef:
            divides("ptx.mini_batch_size", self.ptx.mini_batch_size, ranks=ranks)
        self.algorithm.check(self.group_size, self.rollout_batch_size // self.mini_batch_size)
        self.rollout.check()
        self.rollout.check_unbiased(self.algorithm.adaptive_kl_target)

    def row_sets(self) -> list[tuple[Data, Kind, str, int]]:
        return [*super().row_sets(), (self.ptx.data, "sft", "ptx.max_length", self.ptx.max_length)]

    def inputs(self) -> dict[str, str]:
        return super().inputs() | _reward_inputs(self)


@dataclass
class Evaluate(Stage):
    """Answer held-out prompts with several policies and score them."""

    rollout: Any = MISSING
    rewards: dict[str, Any] = field(default_factory=dict)  # {name: reward}: the judge
    policies: dict[str, str] = field(default_factory=dict)  # {name: model path or run}; shown in this order
    reference: str | None = None  # name in `policies` that KL and differences are taken against; None: the first
    group_size: int = num(1, ge=1)  # answers a prompt
    max_prompt_length: int = num(256, ge=1)  # tokens; longer prompts are left out and counted
    bootstrap: int = num(2000, ge=1)  # resamples of the prompts for the confidence intervals

    stage: ClassVar[str] = "evaluate"
    groups: ClassVar[tuple[str, ...]] = ("deepspeed", "launcher", "logger", "rollout")

    def check(self) -> None:
        super().check()
        _some_reward(self)
        self.rollout.check()
        if not self.policies:
            raise InputError("policies is empty: name at least one, as in +policies.sft=runs/<name>/sft")
        if self.reference is not None and self.reference not in self.policies:
            raise InputError(f"reference={self.reference!r} is not among policies {sorted(self.policies)}")

    def inputs(self) -> dict[str, str]:
        return {f"policies.{name}": path for name, path in self.policies.items()} | _reward_inputs(self)


@dataclass
class Pipeline:
    """All stages in order; what is set here is handed to each by the interpolations of conf/pipeline.yaml."""

    run_name: str = MISSING  # folder under runs_dir
    runs_dir: str = "runs"
    seed: int = num(0, ge=0, le=SEEDS)
    dry_run: bool = False
    resume: bool = False  # keep the finished stages of this run_name, do the others
    reuse: bool = True  # link to finished stages of the same config and inputs under runs_dir, make the others
    verify: str = "auto"  # auto | full: runs that are read, by size and time and then by hash | by every byte
    model: Model = field(default_factory=Model)
    deepspeed: Any = MISSING
    launcher: Any = MISSING
    logger: Any = MISSING
    finetune: Any = MISSING
    rollout: Any = MISSING
    next_commands: list[str] = field(default_factory=list)  # printed at the end: how to go on from here
    sft: SFT = field(default_factory=SFT)
    sample: Sample = field(default_factory=Sample)
    reward: Reward = field(default_factory=Reward)
    ppo: PPO = field(default_factory=PPO)
    evaluate: Evaluate = field(default_factory=Evaluate)

    stage: ClassVar[str] = "pipeline"
    groups: ClassVar[tuple[str, ...]] = ("deepspeed", "launcher", "logger", "finetune", "rollout")

    def stages(self) -> list[Stage]:
        """The stages in the order they run."""
        return [self.sft, self.sample, self.reward, self.ppo, self.evaluate]


STAGES: dict[str, Any] = {cls.stage: cls for cls in (SFT, Sample, Reward, PPO, Evaluate, Pipeline)}


def components(group: str) -> dict[str, Any]:
    """{name: dataclass} of a group, in alphabetical order. Imports its files, which import nothing heavy."""
    root = importlib.import_module(GROUPS[group])
    modules = [root]
    if hasattr(root, "__path__"):
        modules = [
            importlib.import_module(f"{root.__name__}.{path.stem}")
            for path in sorted(Path(root.__path__[0]).glob("*.py"))
            if '\n    name: str = "'
            in path.read_text(encoding="utf-8")  # not the tensor maths that options share: it imports torch
        ]
    found = {}
    for module in modules:
        for cls in vars(module).values():
            if isinstance(cls, type) and is_dataclass(cls) and cls.__module__ == module.__name__:
                names = [f.default for f in fields(cls) if f.name == "name"]
                if names and isinstance(names[0], str) and names[0]:  # "": what several options share
                    found[names[0]] = cls
    return dict(sorted(found.items()))


def register() -> None:
    """Tell Hydra's ConfigStore every stage schema and every component, and to make no folders or logs of its own."""
    from hydra.conf import HydraConf, RunDir, SweepDir
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    quiet = HydraConf(run=RunDir("."), sweep=SweepDir("${runs_dir}", "."), output_subdir=None)
    quiet.defaults = [
        d | {key: "none"} if (key := next(iter(d))) in ("hydra_logging", "job_logging") else d for d in quiet.defaults
    ]
    store.store(group="hydra", name="config", node=quiet, provider="alignkit")
    for stage, cls in STAGES.items():
        store.store(name=f"{stage}_schema", node=cls, provider="alignkit")
    for group in GROUPS:
        for name, cls in components(group).items():
            store.store(group=group, name=name, node=cls, provider="alignkit")


def to_config(composed: DictConfig, stage: str) -> Any:
    """A composed (or loaded) config as the dataclass of its stage, components included, checked.

    Raises:
        InputError: a value is missing, has the wrong type or contradicts another.
    """
    try:
        config = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error).split("'")[-2]
        raise InputError(f"{key} is not set: add {key}=... to the command (or to your experiment file)") from None
    except InterpolationResolutionError as error:
        raise InputError(f"{one_line(error)}: ${{…}} refers to another key; rename what is called so") from None
    except OmegaConfBaseException as error:
        raise InputError(one_line(error)) from None
    if not isinstance(config, STAGES[stage]):
        raise InputError(f"not a {stage} config: its file must have {stage}_schema first in its defaults list")
    said = list(texts(OmegaConf.to_container(composed, resolve=True)))
    credentials.check(said)
    for key, text in said:
        if "${" in text:  # the saved config would be read as a reference
            raise InputError(f"{key}={text}: ${{ begins a reference to another key, so no text has it: rename it")
    if stray := stray_keys(composed):  # Hydra's "+" adds what no dataclass has a field for
        near = nearest_key(stray[0], OmegaConf.structured(config))
        raise InputError(f"no config key {stray[0]!r}{f': did you mean {near}?' if near else ''}")
    check_numbers(config)
    for part in config.stages() if isinstance(config, Pipeline) else [config]:
        part.check()
        for line in contradictions(part):
            raise InputError(line)
    return config


def save(config: Any, path: Path) -> None:
    """Write the config as YAML, component names included."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def load(path: Path, stage: str) -> Any:
    """Read back what `save` wrote, every default and type as strict as when it was composed."""
    raw = foreign.load(path)
    try:
        whole = OmegaConf.merge(_schema(STAGES[stage], raw), raw)
    except (OmegaConfBaseException, KeyError, AttributeError) as error:  # a key, or a component, that is no more
        what = one_line(error) if isinstance(error, OmegaConfBaseException) else f"no component {error}"
        fix = "go on with it in that version (its manifest.json says which), or start anew under another run_name="
        raise InputError(f"{path} was written by another version of alignkit: {what}: {fix}") from None
    return to_config(whole, stage)


def _schema(cls: Any, raw: Any) -> DictConfig:
    """The node of a stage, with the components that a saved config names; of a pipeline, with its stages."""
    node = OmegaConf.structured(cls)
    for group in cls.groups:
        node[group] = OmegaConf.structured(components(group)[raw[group].name])
    if "rewards" in raw:
        node.rewards = {key: components("reward")[item.name] for key, item in raw.rewards.items()}
    for name in STAGES.keys() & raw.keys():
        node[name] = _schema(STAGES[name], raw[name])
    return node


def config_hash(config: Any) -> str:
    """16 hex digits of what the stage computes from (`computed_from`)."""
    plain: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config), throw_on_missing=False)
    return hashlib.sha256(json.dumps(computed_from(plain), sort_keys=True).encode()).hexdigest()[:16]


def _some_reward(config: Any) -> None:
    if not config.rewards:
        raise InputError(
            f"{config.stage}: rewards is empty: add one, as in +reward@rewards.<name>=<{'|'.join(components('reward'))}>"
        )


def _reward_inputs(config: Any) -> dict[str, str]:
    return {f"rewards.{name}": item.path for name, item in config.rewards.items() if hasattr(item, "path")}
