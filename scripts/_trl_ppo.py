"""The peer's half of bench_vs_trl.py: TRL 0.25.1's PPOTrainer, run by the interpreter of an environment of its own."""

import itertools
import json
import resource
import sys
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import PPOConfig, PPOTrainer

settings = json.loads(open(sys.argv[1], encoding="utf-8").read())  # noqa: SIM115
torch.manual_seed(0)
base = settings["base"]
tokenizer = PreTrainedTokenizerFast(
    tokenizer_file=f"{base}/tokenizer.json", eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
)
rows = [{"input_ids": ids} for ids in settings["prompts"]]
policy = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
value, reward = (
    AutoModelForSequenceClassification.from_pretrained(base, torch_dtype=torch.float32, num_labels=1) for _ in range(2)
)
ends: list[float] = []


class Stamp(TrainerCallback):
    """Notes when each update ends."""

    def on_step_end(self, args, state, control, **kwargs):
        ends.append(time.perf_counter())


batch = settings["batch"]
config = PPOConfig(
    output_dir=settings["out"], per_device_train_batch_size=batch // settings["minibatches"],
    gradient_accumulation_steps=settings["minibatches"], num_mini_batches=settings["minibatches"],
    total_episodes=batch * settings["updates"], num_ppo_epochs=settings["epochs"], response_length=settings["tokens"],
    local_rollout_forward_batch_size=batch, temperature=settings["temperature"], kl_coef=0.05, learning_rate=1e-5,
    num_sample_generations=0, save_strategy="no", report_to=[], use_cpu=True, stop_token="eos", missing_eos_penalty=1.0,
    bf16=False, disable_tqdm=True, logging_strategy="no",
)  # fmt: skip
blocks, last = policy.config.num_hidden_layers, settings["last_layers"]
lora = LoraConfig(
    r=settings["rank"], lora_alpha=2 * settings["rank"], task_type="CAUSAL_LM",
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    layers_to_transform=list(range(blocks - last, blocks)) if last else None,
)  # fmt: skip
trainer = PPOTrainer(
    config, tokenizer, policy, None, reward, Dataset.from_list(rows), value, eval_dataset=Dataset.from_list(rows[:4]),
    peft_config=lora,
    callbacks=[Stamp()],
)  # fmt: skip
trainer.train()
seconds = [b - a for a, b in itertools.pairwise(ends)]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
print("RESULT " + json.dumps({"seconds": seconds, "peak_mib": round(peak)}), flush=True)
