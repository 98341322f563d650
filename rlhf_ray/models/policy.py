"""The policy: a causal language model with its tokenizer and chat template, new or from a folder."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_ray.config import ModelConfig
from rlhf_ray.errors import ConfigError, DataError, ModelError
from rlhf_ray.models.files import read_folder
from rlhf_ray.models.folder import explained, load_weights, save_folder
from rlhf_ray.types import Exchange, Message, Prompt

PAD, START, END = "<pad>", "<s>", "</s>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
MOST_NESTED = 64
"""Layers of special tokens spelled out within each other."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], *, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, learned from `texts`; any text survives a round trip.

    It may hold fewer than `vocabulary` tokens where the texts have fewer merges to give.
    """
    tokenizer = byte_level_bpe(texts, vocabulary=vocabulary, specials=[PAD, START, END, *ROLE_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def byte_level_bpe(texts: Iterable[str], *, vocabulary: int, specials: list[str]) -> Tokenizer:
    """Merges of bytes learned from `texts`, the same from the same texts; the special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> LlamaForCausalLM:
    """An untrained Llama that fits the tokenizer; the same seed gives the same weights.

    Its matrices start at a standard deviation of hidden^-0.5, so that attention tells tokens apart from the first
    step. The usual constant of 0.02 suits models twenty times as wide; at this size it hides copying from the
    gradient for the first thousand steps.
    """
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        initializer_range=config.hidden**-0.5,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama).eval()


def save_policy(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a folder that `AutoModelForCausalLM`, `AutoTokenizer` and vLLM load; it appears whole or not at all."""
    save_folder(folder, model, tokenizer)


def load_tokenizer(path: Path, *, context: int | None = None) -> PreTrainedTokenizerBase:
    """The policy's tokenizer; `ModelError` where it cannot render a dialogue or end an answer.

    With `context` it takes no more tokens than that, whatever it says of itself.
    """
    if not path.is_dir():
        raise ModelError(f"no tokenizer at {path}: give a folder that save_pretrained wrote")
    with explained(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ModelError(f"tokenizer {path} has no chat template; add chat_template.jinja to the folder")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"tokenizer {path} has no end token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if context is not None:
        tokenizer.model_max_length = min(context, tokenizer.model_max_length)
    return tokenizer


def load_policy(path: Path, **options: Any) -> PreTrainedModel:
    """The policy of a folder, in float32 unless `options` (`load_weights`') say otherwise.

    `ModelError` where the folder or its tokenizer does not fit.
    """
    read_folder(path, "policy")
    model: PreTrainedModel = load_weights(AutoModelForCausalLM, path, "policy", **options)
    check_vocabulary(model, path)
    return model


def check_vocabulary(policy: PreTrainedModel, path: Path) -> None:
    """`ModelError` where the folder's tokenizer makes tokens that the policy has no embedding for."""
    tokens, rows = len(load_tokenizer(path)), policy.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise ModelError(
            f"policy {path} embeds {rows} tokens and its tokenizer makes {tokens}; "
            "use the tokenizer that the model was trained with"
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, room: int = 0) -> list[int]:
    """The prompt's token ids, up to where the answer begins.

    `DataError` where the tokenizer's longest input would not hold them and `room` tokens of an answer.
    Special tokens spelled out in a message are dropped: text cannot speak in another role's name.
    """
    turns = [
        {"role": message.role, "content": without_specials(tokenizer, message.content)} for message in prompt.messages
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) + room > tokenizer.model_max_length:
        raise DataError(
            f"prompt {prompt.id} takes {len(ids)} tokens, which with {room} for an answer exceed the policy's context "
            f"of {tokenizer.model_max_length}; shorten the prompt or raise model.context"
        )
    return ids


def stop_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, ...]:
    """The token that each text is; `ConfigError` where it is several, for a response can end at one only."""
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for text, ids in zip(texts, tokens, strict=True):
        if len(ids) != 1:
            raise ConfigError(
                f"rollout.stop: {text!r} is {len(ids)} tokens of this policy ({tokenizer.convert_ids_to_tokens(ids)}), "
                "and a response ends at one: give that one, or leave it out"
            )
    return tuple(ids[0] for ids in tokens)


def encode_reply(
    tokenizer: PreTrainedTokenizerBase, dialogue: Sequence[Message], reply: Sequence[Message]
) -> list[int]:
    """What stands between the end token of the dialogue's last turn, an answer, and where the next answer begins.

    `ModelError` where the chat template writes earlier turns otherwise once more follow: then a dialogue's tokens
    cannot grow.
    """

    def rendered(messages: Sequence[Message], *, ask: bool) -> str:
        turns = [{"role": turn.role, "content": without_specials(tokenizer, turn.content)} for turn in messages]
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
        return text

    before, after = rendered(dialogue, ask=False), rendered([*dialogue, *reply], ask=True)
    end = before.rfind(tokenizer.eos_token) + len(tokenizer.eos_token)
    if end < len(tokenizer.eos_token) or not after.startswith(before[:end]):
        raise ModelError(
            "this policy's chat template does not end an answer with its end token, or rewrites earlier turns; "
            "dialogues of several turns need one that only appends"
        )
    ids: list[int] = tokenizer(after[end:], add_special_tokens=False)["input_ids"]
    return ids


def encode_exchange(tokenizer: PreTrainedTokenizerBase, exchange: Exchange) -> tuple[list[int], int]:
    """Token ids of prompt, response and end token, and how many of them are the prompt's."""
    prompt_ids = encode_prompt(tokenizer, exchange.prompt)
    response = without_specials(tokenizer, exchange.response)
    ids = [*prompt_ids, *tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if len(ids) > tokenizer.model_max_length:
        raise DataError(
            f"prompt {exchange.prompt.id} with its response takes {len(ids)} tokens, more than the policy's context "
            f"of {tokenizer.model_max_length}; shorten it or raise model.context"
        )
    return ids, len(prompt_ids)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a plain text between start and end token, cut to the context."""
    ids = tokenizer(without_specials(tokenizer, text), add_special_tokens=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*start, *ids, tokenizer.eos_token_id][: tokenizer.model_max_length]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The text of a response, special tokens left out."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text


def prompt_text(messages: Iterable[Message]) -> str:
    """A dialogue for people and for tokenizers without a chat template: one `role: content` line a turn."""
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


def without_specials(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text less the spelled-out special tokens in it, which the tokenizer would take for real ones.

    `DataError` where they are nested so deeply that nobody can have meant it: each layer costs a pass over the text.
    """
    found, passes = True, 0
    while found:  # removing one may join the halves of another
        found, passes = False, passes + 1
        if passes > MOST_NESTED:
            raise DataError(f"special tokens spelled out in more than {MOST_NESTED} layers: leave them out of the text")
        for special in tokenizer.all_special_tokens:
            if special in text:
                text, found = text.replace(special, ""), True
    return text
