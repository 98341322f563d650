"""One workload for this project and its peers: plain Hugging Face folders and a file of prompts, which all can read.

64 rollouts a step from prompts of 16 tokens, up to 64 tokens each; policy, critic, reference and reward model of one
size, random Llamas in float32. The end token's logit is nearly constant by construction: it never comes (`fixed`, every
response has 64 tokens), or so often that responses are a third of that in the mean (`natural`).
"""

import json
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

SIZES = {"1M": (128, 4, 384, 4, 1024), "10M": (320, 8, 960, 10, 2048)}
"""Width, depth, feed-forward width, heads, vocabulary."""
ROLLOUTS, PROMPT, RESPONSE, MINIBATCH = 64, 16, 64, 16
PAD, END = 0, 1
CONSTANT = 0.1
"""What the first dimension of the residual stream holds at every place."""
END_LOGIT = {"fixed": -20.0, "natural": 3.9}
"""`natural`: a chance of some 0.045 a token among 1,024, so 21 tokens in the mean of at most 64."""
WANTED_ID = 3
"""What is rewarded where the workload is learnt: the share of a response's tokens whose id leaves 3 over 16."""


def make_workload(folder: Path, size: str, *, lengths: str = "fixed", seed: int = 0, prompts: int = 512) -> Path:
    """Writes `policy`, `reward_model` and `prompts.json` into a folder."""
    hidden, layers, intermediate, heads, vocabulary = SIZES[size]
    tokenizer = _tokenizer(vocabulary)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512, tie_word_embeddings=False,
        pad_token_id=PAD, eos_token_id=END, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(config)
    more = END_LOGIT[lengths] + (torch.log(torch.tensor(vocabulary / 1024)).item() if lengths == "natural" else 0.0)
    _fix_end(policy, more)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward_model")
    tokenizer.save_pretrained(folder / "reward_model")
    draw = Random(seed)
    ids = [[draw.randrange(2, vocabulary) for _ in range(PROMPT)] for _ in range(prompts)]
    (folder / "prompts.json").write_text(json.dumps(ids))
    return folder


def words(ids: list[int]) -> str:
    """Tokens as text, which reads back as the very same tokens."""
    return " ".join(f"w{id}" for id in ids)


def share(text: str) -> float:
    """What a response earns where the workload is learnt."""
    ids = [int(word[1:]) for word in text.split()]
    return sum(id % 16 == WANTED_ID for id in ids) / max(1, len(ids))


def share_of_wanted(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
    """The same as a reward function of a run."""
    return [share(completion[-1]["content"]) for completion in completions]


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word a token."""
    known = {"<pad>": PAD, "<end>": END, **{f"w{id}": id for id in range(2, vocabulary)}}
    plain = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", model_max_length=512, padding_side="left"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


@torch.no_grad()
def _fix_end(policy: LlamaForCausalLM, logit: float) -> None:
    """Makes the end token's logit about this at every place: one dimension is the same everywhere, and it alone reads
    that one.
    """
    policy.model.embed_tokens.weight[:, 0] = CONSTANT
    for layer in policy.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    policy.lm_head.weight[:, 0] = 0.0
    normed = policy.model(torch.randint(2, 100, (8, 32))).last_hidden_state[..., 0].mean()
    policy.lm_head.weight[END] = 0.0
    policy.lm_head.weight[END, 0] = logit / normed
