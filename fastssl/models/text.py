"""Text towers, captions to features: a small one of ours, open_clip's, transformers'."""

import re
from collections.abc import Callable, Sequence
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..extras import nearest, require
from .vit import Block

Pool = Literal["eot", "cls", "mean", "max"]


class WordTokenizer:
    """Captions as the numbers of their words, by a hash: there is no vocabulary to build or lose;
    two words share a number with a probability of about 1 / vocab.

    0 pads, vocab - 2 begins a caption and vocab - 1, the largest number, ends it.

    Args:
        vocab: numbers in all, at least 4. length: of the longest captions, longer ones are cut.

    Example:
        >>> ids, lengths = WordTokenizer()(["A red ring", "a  RED ring on the left"])
        >>> ids.shape, lengths.tolist(), bool((ids[0, :4] == ids[1, :4]).all())
        (torch.Size([2, 8]), [5, 8], True)
    """

    def __init__(self, vocab: int = 8192, length: int = 32):
        self.vocab, self.length = vocab, length

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L) int64, L that of the longest, and (B,) int64: how many are no padding."""
        sot, eot, words = self.vocab - 2, self.vocab - 1, self.vocab - 3
        rows = []
        for caption in captions:
            found = re.findall(r"\w+|[^\w\s]", caption.lower())[: self.length - 2]
            ids = [1 + crc32(word.encode()) % words for word in found]
            rows.append(torch.tensor([sot, *ids, eot]))
        return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


class TextSmall(nn.Module):
    """Pre-norm blocks over tokens, with learned positions. About 1 M parameters.

    Args:
        causal: a token sees those before it and itself; else all that are no padding.
        vocab, length: of the tokenizer.
    """

    def __init__(
        self,
        *,
        causal: bool = True,
        vocab: int = 8192,
        length: int = 32,
        feature_dim: int = 96,
        depth: int = 2,
        heads: int = 3,
    ):
        super().__init__()
        self.causal, self.feature_dim = causal, feature_dim
        self.words = nn.Embedding(vocab, feature_dim)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(length, feature_dim))
        self.blocks = nn.ModuleList(Block(feature_dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(feature_dim)
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, L) int64, of which `lengths` (B,) are no padding, to (B, L, feature_dim)."""
        B, L = ids.shape
        if self.causal:
            mask = torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()
        else:
            mask = _real(L, lengths).view(B, 1, 1, L)
        x = self.words(ids) + self.pos_embed[:L]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def _real(L: int, lengths: Tensor) -> Tensor:
    """(B, L) bool: which tokens are no padding."""
    return torch.arange(L, device=lengths.device) < lengths[:, None]


def pooled(states: Tensor, lengths: Tensor, how: Pool) -> Tensor:
    """One vector of each caption's token states.

    Args:
        states: (B, L, D). lengths: (B,) int64, tokens that are no padding, at least 1.
        how: "eot" the last of them, "cls" the first, "mean" or "max" over them.

    Returns:
        (B, D).
    """
    B, L, _ = states.shape
    if how == "cls":
        return states[:, 0]
    if how == "eot":
        return states[torch.arange(B, device=states.device), lengths - 1]
    padding = ~_real(L, lengths)[..., None]
    if how == "max":
        return states.masked_fill(padding, -torch.inf).amax(1)
    return states.masked_fill(padding, 0).sum(1) / lengths[:, None]


class TextTower(nn.Module):
    """Tokenizer, transformer and pooling: B captions to (B, feature_dim).

    Args:
        tokenize: captions to (B, L) int64 and (B,) int64, the tokens of each that are no padding.
        network: of these two to (B, L, feature_dim).
        pool: see `pooled`.
    """

    def __init__(
        self,
        tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        network: nn.Module,
        feature_dim: int,
        pool: Pool,
    ):
        super().__init__()
        self.tokenize, self.network = tokenize, network
        self.feature_dim, self.pool = feature_dim, pool

    def forward(self, captions: Sequence[str]) -> Tensor:
        device = next(self.network.parameters()).device
        ids, lengths = (x.to(device, non_blocking=True) for x in self.tokenize(captions))
        return self.encode(ids, lengths)

    def encode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """What `tokenize` makes of B captions, to (B, feature_dim)."""
        return pooled(self.network(ids, lengths), lengths, self.pool)


def build_text_tower(
    name: str, *, pool: Pool = "eot", causal: bool = True, freeze_below: int = 0
) -> TextTower:
    """Build a text tower.

    Args:
        name: `text_small`, random weights from torch's generator; `open_clip:NAME`, the text tower
            of one of its models, random or, as `open_clip:NAME:TAG`, as published under that tag;
            `transformers:NAME`, a BERT as published or saved in a folder. These bring their
            tokenizers; the first has `WordTokenizer`.
        pool: how the states of a caption's tokens become one vector, see `pooled`.
        causal: of text_small; the others are as they are.
        freeze_below: so many blocks, and what stands below them, do not train; 0: all do.

    Raises:
        ValueError: unknown name, or a model of another kind; more frozen blocks than there are.
        ImportError: open_clip or transformers is missing.
        OSError: published weights that cannot be had.

    Example:
        >>> build_text_tower("text_small", pool="max")(["a red ring", "a blue star"]).shape
        torch.Size([2, 96])
    """
    library, _, model = name.partition(":")
    if name == "text_small":
        network = TextSmall(causal=causal)
        lowest, blocks = [network.words, network.pos_embed], network.blocks
        tower = TextTower(WordTokenizer(), network, network.feature_dim, pool)
    elif library == "open_clip" and model:
        tower = _open_clip(model, pool)
        text = tower.network.text
        lowest, blocks = [text.token_embedding, text.positional_embedding], text.transformer
        blocks = blocks.resblocks
    elif library == "transformers" and model:
        tower = _transformers(model, pool)
        bert = tower.network.bert
        lowest, blocks = [bert.embeddings], bert.encoder.layer
    else:
        known = nearest(name, ["text_small", "open_clip:NAME", "transformers:NAME"])
        raise ValueError(f"build_text_tower: unknown text tower {name!r}. {known}")
    if not 0 <= freeze_below <= len(blocks):
        raise ValueError(
            f"build_text_tower: freeze_below must be between 0 and the {len(blocks)} blocks of "
            f"{name}, got {freeze_below}."
        )
    if freeze_below:
        for part in (*lowest, *blocks[:freeze_below]):
            part.requires_grad_(False)
    return tower


class _OpenCLIP(nn.Module):
    def __init__(self, text: nn.Module):
        super().__init__()
        self.text = text

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.text(ids)[1]


def _open_clip(name: str, pool: Pool) -> TextTower:
    open_clip = require("open_clip", "text")
    name, _, tag = name.partition(":")
    if name not in open_clip.list_models():
        known = nearest(name, open_clip.list_models())
        raise ValueError(f"build_text_tower: open_clip has no model {name!r}. {known}")
    text = open_clip.create_model(name, pretrained=tag or None, force_custom_text=True).text
    if getattr(text, "pool_type", None) != "argmax" or text.cls_emb is not None:
        raise ValueError(
            f"build_text_tower: open_clip:{name} must have CLIP's own text tower, got "
            f"{type(text).__name__}. Use transformers:NAME for others."
        )
    text.text_projection, text.output_tokens = None, True  # the method projects
    words = open_clip.get_tokenizer(name)

    def tokenize(captions):
        ids = words(list(captions))
        return ids, ids.argmax(1) + 1  # the token that ends a caption is the largest

    return TextTower(tokenize, _OpenCLIP(text), text.width, pool)


class _BERT(nn.Module):
    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        real = _real(ids.shape[1], lengths)
        return self.bert(input_ids=ids, attention_mask=real.long()).last_hidden_state


def _transformers(name: str, pool: Pool) -> TextTower:
    transformers = require("transformers", "text")
    bert = transformers.AutoModel.from_pretrained(name)
    if not hasattr(bert, "embeddings") or not hasattr(getattr(bert, "encoder", None), "layer"):
        raise ValueError(
            f"build_text_tower: transformers:{name} must be a BERT or built like one, got "
            f"{type(bert).__name__}."
        )
    bert.pooler = None  # its parameters would take no gradient
    words = transformers.AutoTokenizer.from_pretrained(name)
    length = min(words.model_max_length, bert.config.max_position_embeddings)

    def tokenize(captions):
        found = words(
            list(captions), padding=True, truncation=True, max_length=length, padding_side="right",
            return_tensors="pt",
        )  # fmt: skip
        return found["input_ids"], found["attention_mask"].sum(1)

    return TextTower(tokenize, _BERT(bert), bert.config.hidden_size, pool)
