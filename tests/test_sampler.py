"""The sampler's law: what `rollout.hf` draws, the log-probs it reports, and what top-p does to the KL.

The number in a test's name is its number in the list of correctness tests.
"""

from __future__ import annotations

import copy

import pytest
import torch
from nets import STYLES, VOCAB, generator, language_model, make_config
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignkit.algorithms import functional as F
from alignkit.algorithms.ppo import PPO
from alignkit.core.errors import InputError
from alignkit.core.types import ModelSource
from alignkit.data.tokens import collate_prompts
from alignkit.models.loading import make_roles
from alignkit.rollout.base import Context, stored_policy, stored_rank
from alignkit.rollout.hf import HF
from alignkit.rollout.server import Server
from alignkit.rollout.vllm import VLLM
from alignkit.stages import ppo as stage

STOP, DRAWS = 0, 20_000


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def policy_and_reference(style, vocab=VOCAB):
    """A policy, and a reference that has its logits doubled, so that the KL is known from the policy's law alone."""
    hf = language_model(style, vocab=vocab, seed=5).eval()
    hf.trained_rows = vocab
    ref = copy.deepcopy(hf)
    norm = ref.transformer.ln_f if style == "gpt2" else ref.model.norm
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter *= 2
    return make_roles({"policy": hf, "ref_policy": ref}, {}, switch=lambda role: None)


def sample(roles, prompts, group_size, seed=0, **law):
    sampling = HF(**law)
    sampling.check()
    context = Context("", "float32", 0, 64, eos_id=STOP, pad_id=STOP, max_sequences=64, roles=roles)
    rows = [{"ids": ids, "index": i, "meta": {}} for i, ids in enumerate(prompts)]
    return sampling.start(context).generate(collate_prompts(rows, STOP), group_size, seed, step=0)


def first_token_law(roles, prompt, temperature):
    with torch.no_grad():
        logits = roles.model("policy")(torch.tensor([prompt])).logits[0, -1].double()
    return (logits / temperature).softmax(0)


@pytest.mark.parametrize("style, prompt", [("gpt2", [1, 5]), ("llama", [1, 5])])
def test_draws_follow_the_law(style, prompt):
    """Chi-square of 2e4 draws from an 8-way softmax at temperature 0.7; 24.32 is passed with probability 0.001."""
    roles = policy_and_reference(style, vocab=8)
    rollouts = sample(roles, [prompt], DRAWS, temperature=0.7, max_new_tokens=1)
    drawn, law = rollouts.response_ids[:, 0], first_token_law(roles, prompt, 0.7)

    def chi_square(law):
        assert law.min() * DRAWS > 20
        return float(((drawn.bincount(minlength=8) - DRAWS * law) ** 2 / (DRAWS * law)).sum())

    assert chi_square(law) < 24.32 < 300 < chi_square(first_token_law(roles, prompt, 1.0))
    torch.testing.assert_close(rollouts.rollout_logprobs[:, 0].double(), law.log()[drawn], rtol=0, atol=1e-5)
    assert torch.equal(rollouts.finished, drawn == STOP)


@pytest.mark.parametrize("style", STYLES)
def test_its_log_probs_are_the_trainers(style):
    """With a cache, ragged prompts padded on the left and responses that stop, against the forward that trains."""
    roles = policy_and_reference(style)
    prompts = [torch.randint(1, VOCAB, (n,), generator=generator(n)).tolist() for n in (1, 4, 9, 2, 6)]
    rollouts = sample(roles, prompts, 8, temperature=0.7, max_new_tokens=16, stop_token_ids=list(range(1, 8)))
    lengths = rollouts.response_mask.sum(1)
    assert len(set(lengths.tolist())) > 4 and 0 < rollouts.finished.sum() < 40
    seen = stage.forward(make_config(PPO(), 8, temperature=0.7), roles, rollouts)
    mask = rollouts.response_mask
    torch.testing.assert_close(seen["policy"][mask], rollouts.rollout_logprobs[mask], rtol=0, atol=1e-5)
    weights = F.importance_weights(seen["policy"], rollouts.rollout_logprobs, mask)
    assert abs(float(weights[mask].mean()) - 1) < 1e-4
    last = rollouts.response_ids.gather(1, lengths[:, None] - 1)[:, 0]
    assert torch.equal(rollouts.finished, last < 8)  # the stop is the last token, and no other
    assert ((rollouts.response_ids < 8) & mask).sum() == rollouts.finished.sum()


def test_a_response_depends_on_seed_step_prompt_and_place_only():
    """Not on its batch mates: each has a stream of its own."""
    roles = policy_and_reference("llama")
    prompts = [[5, 6, 7], [8, 9], [10]]
    together = sample(roles, prompts, 3, max_new_tokens=8)
    by_itself = sample(roles, prompts[:1], 3, max_new_tokens=8)
    assert torch.equal(together.response_ids[:3], by_itself.response_ids)
    assert len({tuple(row) for row in together.response_ids[:3].tolist()}) == 3
    assert not torch.equal(sample(roles, prompts, 3, seed=1, max_new_tokens=8).response_ids, together.response_ids)


def test_a_frozen_head_is_not_copied_for_every_row():
    """The largest block that sampling one token of 32 rows allocates in bfloat16, in heads."""
    from torch.profiler import ProfilerActivity, profile

    roles = policy_and_reference("llama", vocab=4096).to(torch.bfloat16).requires_grad_(False)
    head = roles.model("policy").get_output_embeddings().weight
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        sample(roles, [[1, 5, 6]], 32, max_new_tokens=1)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(event.nbytes() for event in events) < 8 * head.numel() * head.element_size()


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 5, 500])
@pytest.mark.parametrize("min_tokens", [0, 3])
def test_the_law_is_that_of_transformers_warpers(top_p, top_k, min_tokens):
    logits = 3 * torch.randn(50, VOCAB, generator=generator(1))
    logits[:, 2] += 9  # a stop that matters
    ours = HF(temperature=0.7, top_p=top_p, top_k=top_k, min_tokens=min_tokens, max_new_tokens=9)
    for generated in (0, 2, 3):
        warpers = LogitsProcessorList()
        if min_tokens:
            warpers.append(MinNewTokensLengthLogitsProcessor(4, min_tokens, [2, 11], device="cpu"))
        warpers.append(TemperatureLogitsWarper(0.7))
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        theirs = warpers(torch.zeros(50, 4 + generated, dtype=torch.long), logits.clone()).log_softmax(-1)
        found = ours.adjust(logits.clone(), generated, torch.tensor([2, 11]))
        assert torch.equal(found.isinf(), theirs.isinf())
        assert not top_k or found.isfinite().sum(1).max() <= top_k
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("odd", [{"top_p": 0.9}, {"top_k": 5}, {"min_tokens": 1}])
def test_biased_sampling_is_refused(odd):
    HF().check_unbiased()
    HF(**odd, allow_biased_sampling=True).check_unbiased()
    with pytest.raises(InputError, match=next(iter(odd))):
        HF(**odd).check_unbiased()


@pytest.mark.parametrize("law", [{}, {"top_p": 0.6}, {"top_k": 2}])
def test_only_the_policys_own_law_has_a_mean_k1_that_is_the_kl(law):
    """1e4 first tokens, whose KL to the reference is a sum over 8; under top-p and top-k the mean falls below 0."""
    roles = policy_and_reference("gpt2", vocab=8)
    rollouts = sample(roles, [[3, 1, 4]], 10_000, max_new_tokens=1, **law)
    seen = stage.forward(make_config(PPO(), 10_000), roles, rollouts)
    k1 = F.kl_estimate(seen["policy"], seen["ref_policy"], "k1")[:, 0].double()
    mean, error = float(k1.mean()), float(k1.std()) / 100
    p = first_token_law(roles, [3, 1, 4], 1.0)
    kl = float((p * (p.log() - (2 * p.log()).log_softmax(0))).sum())
    assert kl > 0.05
    if law:
        assert mean < -3 * error
    else:
        assert mean >= -3 * error and abs(mean - kl) < 4 * error


def test_a_policy_that_does_not_train_is_sent_as_its_adapter_lies(tmp_path):
    """Rank and files for an engine that is only sent adapters; the bare base has none."""
    for name, rank in (("one", 8), ("two", 32)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(f'{{"r": {rank}}}')
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
        (tmp_path / name / "tokenizer.json").write_text("{}")  # not the engine's business
    sources = [ModelSource("base"), *(ModelSource("base", tmp_path / name) for name in ("one", "two"))]
    assert stored_rank(Server(), sources) == stored_rank(VLLM(payload="adapter"), sources) == 32
    assert stored_rank(Server(), sources[:1]) is None and stored_rank(VLLM(), sources) is None
    assert stored_policy(sources[0], lambda: []).save_adapter is None
    stored_policy(sources[1], lambda: []).save_adapter(tmp_path / "sync" / "version_1")
    sent = {file.name: file.read_bytes() for file in (tmp_path / "sync/version_1").iterdir()}
    assert sent == {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": b"one"}
