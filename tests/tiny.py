"""The tests' language model: a tokenizer trained on the sentences below and a two-layer Llama, made on the spot.

Both are ordinary folders, so every stage loads them as it loads any model: there is no `if tiny` in the code.
"""

from __future__ import annotations

from pathlib import Path

VOCAB = 320
EOS, PAD, BOS = "<|im_end|>", "<pad>", "<|im_start|>"

# ChatML without a default system prompt; `{% generation %}` is not used, as in most released templates.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Every one is a token of its own, alone ("good") and after a space (" good").
WORDS = ["good", "bad", "happy", "sad", "great", "awful", "love", "hate", "yes", "no", "hello", "day"]

SENTENCES = """
Hello, how are you today?
I am happy and the day is good.
I am sad and the day is bad.
What a great day it is for a walk in the park.
What an awful day, I hate the rain.
Do you love music? Yes, I love music and books.
Do you hate the cold? No, I love the snow.
The food was good and the people were great.
The film was bad and the end was awful.
My friend is happy because the sun is out.
My friend is sad because the cat is lost.
Good morning! Are you ready for the day?
Tell me something good about the city.
Tell me something bad about the city.
It was a good book, I read it in one day.
It was a bad book, I did not read to the end.
Yes, that is a great idea, thank you!
No, that is an awful idea, sorry.
Where are you from and what do you do?
I work with computers and I like to cook.
Do you have a dog? Yes, a happy little dog.
Why are you sad? I lost my phone on the train.
What did you eat for lunch? Soup, bread and an apple.
We went to the sea; it was great fun for all of us.
He said: "it's fine, don't worry", but he was not happy.
She said 12 words, 3 of them good, 4 bad, 56 not at all.
""".strip().splitlines()

# {model_type: what its tiny config has beside the sizes of all}
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "mistral": {},
    "phi3": {},
    "gpt2": {},
    "opt": {},
    "stablelm": {},
    "falcon": {},
    "bloom": {},
    "glm4": {},
    "gpt_neox": {},
    "smollm3": {},
    "olmo2": {},
    "phi": {},
    "starcoder2": {},
    "granite": {
        "logits_scaling": 4.0,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
    },
    "cohere": {"logit_scale": 0.25},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}


def tiny_tokenizer(folder):
    """Train, save under `folder` and return a byte-level BPE tokenizer of 320 tokens with a ChatML template.

    eos is `<|im_end|>`, pad is `<pad>` and differs from it; no token is added when it encodes text, there is no bos.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # ASCII and the newline, as the byte-level code writes them; any other character becomes <unk>.
    alphabet = [chr(code) for code in range(0x21, 0x7F)] + ["Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<unk>", PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    words = ["user", "assistant", *WORDS, *(f"x {word}" for word in WORDS)] * 30
    backend.train_from_iterator([*SENTENCES, *words], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=PAD, unk_token="<unk>", model_max_length=512
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [BOS]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_model(folder, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """Save a randomly initialised fp32 Llama (4 heads, 2 key-value heads, tied embeddings) and its tokenizer.

    The head dimension is 32 whatever `hidden` is: vLLM's CPU attention takes nothing smaller. Returns the folder.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    tokenizer = tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def tiny_architecture(folder, kind: str, seed: int = 0, **settings) -> Path:
    """The same in another architecture of transformers: two layers, 128 wide, a head dimension of 32. Returns the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    tokenizer = tiny_tokenizer(folder)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 128,  # OPT's
        "ffn_dim": 256,
        "initializer_range": 0.1,  # answers by its weights, not by chance
        "init_std": 0.1,
    }
    plain = AutoConfig.for_model(kind, pad_token_id=tokenizer.pad_token_id)
    known = {key: value for key, value in sizes.items() if _settable(plain, key)}
    config = AutoConfig.for_model(
        kind, **known | settings, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None
    )  # fmt: skip
    config.dtype = "float32"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return folder


def _settable(config, key: str) -> bool:
    """Whether an architecture has this setting and takes a value for it."""
    try:
        setattr(config, key, getattr(config, key))
    except AttributeError:
        return False
    return True
