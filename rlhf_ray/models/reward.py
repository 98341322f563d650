"""The reward model: a sequence classifier with one label that reads text with its own tokenizer."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import normalizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_ray.algo.batching import by_length, pad
from rlhf_ray.errors import ModelError
from rlhf_ray.models.critic import HEADS
from rlhf_ray.models.files import read_folder
from rlhf_ray.models.folder import explained, load_weights, quiet_transformers, save_folder
from rlhf_ray.models.policy import byte_level_bpe, load_tokenizer, prompt_text, without_specials
from rlhf_ray.models.prefix import can_go_on, common_prefix, logits_after
from rlhf_ray.models.sureness import Considered, Sureness, load_sureness
from rlhf_ray.types import Exchange, Message

BATCH_TOKENS = 4096
"""Padded tokens that one forward pass scores."""
PADDING, LEAST = 1.1, 1024
"""Of those passes: `by_length`'s bounds, measured in docs/log.md."""
SAVED = 256
"""Tokens that reading a common prefix once has to save, for what goes through the model by itself is a pass more."""


class RewardModel:
    """A model and its tokenizer: text in, a number out; a text's score does not depend on what it is batched with."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Settles the padding: right, with the token that the model's pooling skips."""
        self.model = model
        self.tokenizer = tokenizer
        self.sureness: Sureness | None = None
        pads = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        self._pad_id = next((i for i in pads if i is not None), 0)
        # a decoder's classifier reads its score at the last token that is not this one
        model.config.pad_token_id = self._pad_id
        tokenizer.truncation_side = "left"  # the answer is at the end

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        """The reward of each exchange, in their order; like lengths share a forward pass."""
        return self.score_texts(*self._rendered(exchanges))

    def score_texts(self, texts: Sequence[str], prompts: Sequence[Hashable] = ()) -> list[float]:
        """The reward of texts that hold prompt and answer already, rendered as the model's own template does it.

        prompts: for each text, what it answers, where that is known. What texts of one prompt begin with is read once.
        """
        numbers: list[float] = self._read(self._encode(texts), prompts)[:, 0].tolist()
        return numbers

    def consider(self, exchanges: Sequence[Exchange]) -> Considered:
        """The rewards that `score` gives, and how sure they are, where the model knows that: in one pass."""
        return self.consider_texts(*self._rendered(exchanges))

    def consider_texts(self, texts: Sequence[str], prompts: Sequence[Hashable] = ()) -> Considered:
        """The same of texts as `score_texts` reads them."""
        if self.sureness is None or not texts:
            return Considered(self.score_texts(texts, prompts), [], [], self.mean)
        features = self.features(self._encode(texts), prompts)
        spreads = self.sureness.spread(features).tolist() if self.has_heads else []
        with torch.inference_mode():
            rewards = self.head(features.to(self.model.device)).float().cpu()[:, 0]
        return Considered(
            rewards.tolist(),
            spreads,
            self.sureness.strange(features).tolist(),
            self.mean,
        )

    def opinions(self, exchanges: Sequence[Exchange]) -> torch.Tensor:
        """(B, K) what each of its heads makes of each exchange; no column where it has none."""
        if self.sureness is None:
            return torch.zeros(len(exchanges), 0)
        return self.sureness.opinions(self.features(self.encode(exchanges)))

    @property
    def has_heads(self) -> bool:
        """Whether several last layers tell how sure it is."""
        return self.sureness is not None and len(self.sureness.heads) > 1

    def features(self, encoded: Sequence[Sequence[int]], prompts: Sequence[Hashable] = ()) -> torch.Tensor:
        """(B, H) what the head reads of token id lists, without gradients; `prompts` as `score_texts` has them."""
        with self._headless():
            return self._read(encoded, prompts)

    @property
    def mean(self) -> float:
        """Its score of what it learnt from, in the mean, where that is known: what a decoder's head cannot take off."""
        return float(getattr(self.model.config, "score_mean", 0.0))

    @mean.setter
    def mean(self, value: float) -> None:
        self.model.config.score_mean = value

    @property
    def head(self) -> nn.Linear:
        """The last layer, which turns what the body has read into numbers."""
        return self._head()[1]

    def begin_head_anew(self) -> None:
        """Draws its weights, as for a model whose head has learnt nothing."""
        torch.nn.init.normal_(self.head.weight, std=getattr(self.model.config, "initializer_range", 0.02))
        if self.head.bias is not None:
            torch.nn.init.zeros_(self.head.bias)

    def fold_heads(self, weights: Sequence[float]) -> None:
        """Makes the head's outputs one: their sum by weight."""
        name, old = self._head()
        by = torch.tensor(weights, dtype=old.weight.dtype, device=old.weight.device)
        assert len(by) == old.out_features, (len(by), old.out_features)
        one = nn.Linear(old.in_features, 1, bias=old.bias is not None, dtype=by.dtype, device=by.device)
        with torch.no_grad():
            one.weight.copy_(by[None] @ old.weight)
            if old.bias is not None:
                one.bias.copy_(by @ old.bias)
        self.model.set_submodule(name, one)
        self.model.config.num_labels = 1
        self.model.num_labels = 1

    def _rendered(self, exchanges: Sequence[Exchange]) -> tuple[list[str], list[Hashable]]:
        texts = [render(self.tokenizer, exchange) for exchange in exchanges]
        return texts, [exchange.prompt.messages for exchange in exchanges]

    def _read(self, encoded: Sequence[Sequence[int]], prompts: Sequence[Hashable] = ()) -> torch.Tensor:
        """(B, outputs) on the CPU; like lengths share a forward pass, so nothing depends on its neighbours."""
        found: torch.Tensor | None = None
        self.model.eval()
        with torch.inference_mode():
            for rows, prefix in self._passes(encoded, prompts):
                logits = self._logits([encoded[row] for row in rows], prefix=prefix).float().cpu()
                found = torch.zeros(len(encoded), logits.shape[1]) if found is None else found
                found[rows] = logits
        return torch.zeros(0, 1) if found is None else found

    def _passes(self, encoded: Sequence[Sequence[int]], prompts: Sequence[Hashable]) -> Iterator[tuple[list[int], int]]:
        """Rows that share a pass, and how many tokens at their beginning are read once."""
        families: dict[Hashable, list[int]] = {}
        for row, prompt in enumerate(prompts):
            families.setdefault(prompt, []).append(row)
        others = [] if prompts else list(range(len(encoded)))
        for family in families.values():
            prefix = self._prefix([encoded[row] for row in family])
            if prefix * (len(family) - 1) < SAVED or not self._goes_on:
                others += family
            else:
                yield from ((rows, prefix) for rows in _by_length(family, encoded))
        yield from ((rows, 0) for rows in _by_length(others, encoded))

    def _prefix(self, rows: Sequence[Sequence[int]]) -> int:
        """What they have in common, less what pooling needs of each: its last token that is no padding."""
        if len(rows) == 1:
            return 0
        ends = (max((i for i, token in enumerate(row) if token != self._pad_id), default=0) for row in rows)
        return min(common_prefix(rows), *ends)

    @cached_property
    def _goes_on(self) -> bool:
        return can_go_on(self.model)

    def _head(self) -> tuple[str, nn.Linear]:
        outputs = self.model.config.num_labels
        layers = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == outputs and name.split(".")[0] in HEADS
        ]
        assert len(layers) == 1, f"{len(layers)} layers with {outputs} outputs"
        return layers[0]

    @contextmanager
    def _headless(self) -> Iterator[None]:
        name, head = self._head()
        self.model.set_submodule(name, nn.Identity())
        try:
            yield
        finally:
            self.model.set_submodule(name, head)

    def encode(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        """The token ids that the model reads, cut at the front where they are longer than it can read."""
        return self._encode([render(self.tokenizer, exchange) for exchange in exchanges])

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        limit = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 1 << 30))
        ids: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=not self.tokenizer.chat_template,  # a template writes its own
            truncation=True,
            max_length=limit,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return ids

    def forward(self, encoded: Sequence[Sequence[int]]) -> torch.Tensor:
        """Scores (B) of token id lists, with gradients where they are on."""
        return self._logits(encoded)[:, 0]

    def _logits(self, encoded: Sequence[Sequence[int]], *, prefix: int = 0) -> torch.Tensor:
        rest = self.collate([row[prefix:] for row in encoded])
        batch = {name: tensor.to(self.model.device) for name, tensor in rest.items()}
        if prefix:
            return logits_after(self.model, encoded[0][:prefix], batch)
        logits: torch.Tensor = self.model(**batch).logits
        return logits

    def collate(self, encoded: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, each (B, longest), padded on the right."""
        ids = pad(encoded, value=self._pad_id, dtype=torch.long)  # (B, T)
        lengths = torch.tensor([len(row) for row in encoded])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def save(self, folder: Path) -> None:
        """Writes a folder that `AutoModelForSequenceClassification` and `AutoTokenizer` load, whole or not at all."""
        save_folder(folder, self.model, self.tokenizer)
        if self.sureness is not None:
            self.sureness.save(folder)


def _by_length(rows: Sequence[int], encoded: Sequence[Sequence[int]]) -> list[list[int]]:
    batches = by_length([len(encoded[row]) for row in rows], max_tokens=BATCH_TOKENS, padding=PADDING, least=LEAST)
    return [[rows[place] for place in batch] for batch in batches]


def load_reward_model(path: Path) -> RewardModel:
    """Any sequence classifier with one label, in float32; `ModelError` for what is none."""
    read_folder(path, "reward model")
    with explained(path, "reward model"):
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        if config.num_labels != 1:
            labels = ", ".join(str(label) for label in config.id2label.values())
            raise ModelError(
                f"reward model {path} has {config.num_labels} labels ({labels}); a reward is one number: "
                "use a sequence classifier with num_labels=1"
            )
        tokenizer = load_any_tokenizer(path)
    model: PreTrainedModel = load_weights(AutoModelForSequenceClassification, path, "reward model")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(f"reward model {path} embeds {rows} tokens and its tokenizer makes {len(tokenizer)}")
    loaded = RewardModel(model, tokenizer)
    loaded.sureness = load_sureness(path)
    return loaded


def new_reward_model(
    base: Path,
    backbone: Literal["decoder", "encoder"],
    *,
    body: Path | None = None,
    heads: int = 1,
    texts: Iterable[str] = (),
    seed: int = 0,
) -> RewardModel:
    """An untrained reward model; the same seed gives the same weights.

    `decoder`: the body and tokenizer of the base policy with a new head. `encoder`: a new BERT of the base policy's
    size, with a tokenizer learned from `texts`. `body`: a pretrained model's folder to take body and tokenizer from
    instead. `heads`: numbers that it says of a text, until `fold_heads` makes them one.
    """
    of = "base policy" if body is None else "reward model's body"
    read_folder(body or base, of)
    with torch.random.fork_rng(devices=[]), explained(body or base, of), quiet_transformers():
        torch.manual_seed(seed)
        if body is not None or backbone == "decoder":
            model = AutoModelForSequenceClassification.from_pretrained(
                str(body or base),
                num_labels=heads,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # a classifier of something else has a head for its own labels
            )
            made = RewardModel(model, load_tokenizer(base) if body is None else load_any_tokenizer(body))
            if body is not None:
                made.begin_head_anew()
            return made
        config = AutoConfig.from_pretrained(str(base), local_files_only=True)
        context = 2 * load_tokenizer(base).model_max_length
        tokenizer = _encoder_tokenizer(texts, vocabulary=config.vocab_size, context=context)
        return RewardModel(_new_bert(config, tokenizer, heads), tokenizer)


def load_any_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer as it is: unlike a policy's it needs neither an end token nor a chat template."""
    with explained(path, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, exchange: Exchange) -> str:
    """The text that a reward model reads: through its chat template where it has one, else a line a turn."""
    turns = [*exchange.prompt.messages, Message("assistant", exchange.response)]
    plain = [Message(turn.role, without_specials(tokenizer, turn.content)) for turn in turns]
    if not tokenizer.chat_template:
        return prompt_text(plain)
    text: str = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in plain], tokenize=False
    )
    return text


def _new_bert(base: Any, tokenizer: PreTrainedTokenizerBase, heads: int) -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=base.hidden_size,
            num_hidden_layers=base.num_hidden_layers,
            num_attention_heads=base.num_attention_heads,
            intermediate_size=base.intermediate_size,
            max_position_embeddings=tokenizer.model_max_length,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=heads,
        )
    )


def _encoder_tokenizer(texts: Iterable[str], *, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Pieces of words, upper and lower case alike, [CLS] before and [SEP] after a text as BERT has it.

    Byte-level BPE: WordPiece's trainer gives its pieces other numbers each time.
    """
    tokenizer = byte_level_bpe(
        (text.lower() for text in texts), vocabulary=vocabulary, specials=["[PAD]", "[CLS]", "[SEP]"]
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=context,
        padding_side="right",
    )
