"""Networks of sequences, tokens and vectors: recurrence, attention, embeddings."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from maml_lightning import ConvNet1d, GRUNet, TextNet
from tests.zoo.case import CLASSES, NOT_TWICE, SERIES, TOKENS, VECTOR, Case

VOCABULARY = 11


class Recurrent(nn.Module):
    """A recurrent network, read at the last step or as the mean over steps; packed ones have sequences of any length.

    Args:
        kind: LSTM, GRU or RNN.
        packed: whether the sequences are packed.
    """

    def __init__(self, kind: type[nn.RNNBase], packed: bool = False, hidden: int = 5, **options: float) -> None:
        super().__init__()
        self.rnn, self.packed = kind(4, hidden, batch_first=True, **options), packed
        size = int(options.get("proj_size", hidden))
        self.head = nn.Linear(2 * size if options.get("bidirectional") else size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return self.head(self.rnn(x)[0].mean(1))
        lengths = torch.arange(len(x)) % x.shape[1] + 1
        hidden, _ = self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return self.head(pad_packed_sequence(hidden, batch_first=True)[0].sum(1))


class Cell(nn.Module):
    """A cell in a Python loop."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = kind(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Filled(nn.Module):
    """Outputs written step by step into a tensor of zeros."""

    def __init__(self, like: bool) -> None:
        super().__init__()
        self.layer, self.head, self.like = nn.Linear(4, 5), nn.Linear(25, CLASSES), like

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 5, 5) if self.like else torch.zeros(len(x), 5, 5, dtype=x.dtype)
        hidden = torch.zeros(len(x), 5, dtype=x.dtype)
        for step in range(5):
            hidden = torch.tanh(self.layer(x[:, step]) + hidden)
            out[:, step] = hidden
        return self.head(out.flatten(1))


class Attention(nn.Module):
    """One layer of attention.

    Args:
        kind: ``module`` for nn.MultiheadAttention, or a way to call F.scaled_dot_product_attention.
    """

    def __init__(self, kind: str, width: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True) if kind.startswith("module") else None
        self.qkv = nn.Linear(width, 3 * width) if self.attention is None else None
        self.head = nn.Linear(width, CLASSES)
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)).bool())

    def forward(self, x: Tensor) -> Tensor:
        if self.attention is not None:
            return self.head(self.attention(x, x, x, need_weights=self.kind == "module with weights")[0].mean(1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        masks = {
            "plain": {},
            "causal": {"is_causal": True},
            "boolean mask": {"attn_mask": self.mask},
            "float mask": {"attn_mask": torch.zeros(5, 5, dtype=x.dtype).masked_fill(~self.mask, -10.0)},
        }
        out = F.scaled_dot_product_attention(q, k, v, **masks[self.kind])
        return self.head(out.transpose(1, 2).flatten(2)[:, -1])


class Encoder(nn.Module):
    """nn.TransformerEncoder."""

    def __init__(self, dropout: float = 0.0, **options: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True, **options)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Seq2Seq(nn.Module):
    """nn.Transformer with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True)
        self.body.encoder.enable_nested_tensor = False
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        return self.head(self.body(x, x[:, :3], tgt_mask=mask, tgt_is_causal=True).mean(1))


class Block(nn.Module):
    """A pre-normalized block of causal or full attention and a perceptron."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.qkv(self.norm_a(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.mlp(self.norm_b(x))


class GPT(nn.Module):
    """A small language model whose head is tied to its embedding, read as a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, 4), nn.Embedding(6, 4)
        self.blocks = nn.Sequential(Block(4, 2, True))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))[:, -1, :CLASSES]


class ViT(nn.Module):
    """Patches, a class token and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(2, 4, 4, stride=4), nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.blocks, self.head = nn.Sequential(Block(4, 2, False)), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.blocks(x)[:, 0])


class Tokens(nn.Module):
    """An embedding of tokens, the mean over them, and a perceptron."""

    def __init__(self, **options: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5, **options)
        self.head = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1))


class Bag(nn.Module):
    def __init__(self, mode: str, offsets: bool = False) -> None:
        super().__init__()
        self.bag, self.head, self.offsets = nn.EmbeddingBag(VOCABULARY, 5, mode=mode), nn.Linear(5, CLASSES), offsets

    def forward(self, tokens: Tensor) -> Tensor:
        if self.offsets:
            starts = torch.arange(len(tokens)) * tokens.shape[1]
            return self.head(self.bag(tokens.flatten(), starts).tanh())
        return self.head(self.bag(tokens).tanh())


class Sparse(nn.Module):
    """A mean over tokens without padding, which indexes by a mask whose size depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 5), nn.Linear(5, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = [self.embedding(row[row > 2]).sum(0) for row in tokens]
        return self.head(torch.stack(rows).tanh())


class Checkpointed(nn.Module):
    """Runs its layers by ``run``, which may recompute them in the backward pass."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run
        self.a, self.b = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.b, self.run(self.a, x)))


def directly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


class BilinearNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Bilinear(4, 6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sin(self.a(x)), x)


class Complex(nn.Module):
    """A complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5, dtype=torch.complex128) / math.sqrt(6))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(self.weight.dtype) @ self.weight).abs())


class Spectrum(nn.Module):
    """A layer in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(4)), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.scale, n=6).tanh())


class CosineHead(nn.Module):
    """Cosine similarities to learned prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.prototypes = nn.Linear(6, 5), nn.Parameter(torch.randn(CLASSES, 5))

    def forward(self, x: Tensor) -> Tensor:
        return 5 * F.normalize(self.body(x)) @ F.normalize(self.prototypes).T


def series(name: str, make, quick: bool = True, **options) -> Case:
    return Case(name, make, SERIES, quick=quick, **options)


def tokens(name: str, make, quick: bool = True, **options) -> Case:
    return Case(name, make, TOKENS, VOCABULARY, quick=quick, **options)


CASES = [
    *(series(kind.__name__, lambda kind=kind: Recurrent(kind), kind is not nn.RNN)
      for kind in (nn.LSTM, nn.GRU, nn.RNN)),
    *(
        series(f"{kind.__name__}, bidirectional, 2 layers",
               lambda kind=kind: Recurrent(kind, bidirectional=True, num_layers=2, dropout=0.0), False)
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    ),
    series("LSTM, projected", lambda: Recurrent(nn.LSTM, hidden=7, proj_size=5), False),
    series("LSTM in evaluation mode", lambda: Recurrent(nn.LSTM), False, evaluation=True),
    *(series(f"{kind.__name__}, packed", lambda kind=kind: Recurrent(kind, packed=True), kind is nn.LSTM)
      for kind in (nn.LSTM, nn.GRU)),
    *(series(kind.__name__, lambda kind=kind: Cell(kind), kind is nn.LSTMCell) for kind in (nn.LSTMCell, nn.GRUCell)),
    series("out[:, i] = h, new_zeros", lambda: Filled(True)),
    series("out[:, i] = h, torch.zeros", lambda: Filled(False), False),
    *(series(f"MultiheadAttention, {kind}", lambda kind=kind: Attention(kind), kind == "module")
      for kind in ("module", "module with weights")),
    *(series(f"scaled_dot_product_attention, {kind}", lambda kind=kind: Attention(kind),
             kind in ("causal", "boolean mask"))
      for kind in ("plain", "causal", "boolean mask", "float mask")),
    series("TransformerEncoder", Encoder),
    series("TransformerEncoder, norm first", lambda: Encoder(norm_first=True), False),
    series("TransformerEncoder in evaluation mode", Encoder, False, evaluation=True),
    series("Transformer", Seq2Seq, False),
    Case("ViT", ViT, quick=False),
    tokens("GPT", GPT),
    tokens("Embedding", Tokens),
    tokens("Embedding(padding_idx)", lambda: Tokens(padding_idx=0)),
    tokens("Embedding(max_norm)", lambda: Tokens(max_norm=1.0), stateful=True),
    tokens("Embedding(scale_grad_by_freq)", lambda: Tokens(scale_grad_by_freq=True), False),
    *(tokens(f"EmbeddingBag({mode})", lambda mode=mode: Bag(mode), mode == "mean", refusal=NOT_TWICE)
      for mode in ("mean", "sum", "max")),
    tokens("EmbeddingBag with offsets", lambda: Bag("mean", offsets=True), False, refusal=NOT_TWICE),
    tokens("masked tokens", Sparse),
    series("GRUNet", lambda: GRUNet(4, CLASSES, 5, 2, True), False),
    series("ConvNet1d", lambda: ConvNet1d(4, CLASSES, 6, 2, 3)),
    tokens("TextNet", lambda: TextNet(VOCABULARY, CLASSES, 4, heads=2)),
    tokens("TextNet with blocks", lambda: TextNet(VOCABULARY, CLASSES, 4, 1, 2, max_length=6)),
    # The plain loop would recompute with the network's own parameters.
    Case("checkpoint", lambda: Checkpointed(partial(checkpoint, use_reentrant=False)), VECTOR,
         plain=lambda: Checkpointed(directly)),
    Case("Bilinear", BilinearNet, VECTOR),
    Case("complex parameters", Complex, VECTOR),
    Case("FFT", Spectrum, VECTOR),
    Case("mse_loss", lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), VECTOR, loss=F.mse_loss),
    Case("smooth_l1_loss", lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), VECTOR,
         loss=F.smooth_l1_loss),
    Case("cosine classifier", CosineHead, VECTOR),
]  # fmt: skip
