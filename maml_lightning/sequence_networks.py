"""Networks for series and text: recurrent, convolutional, and of embeddings and transformer blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_lightning.errors import SettingError
from maml_lightning.networks import check_sizes


class GRUNet(nn.Module):
    """A recurrent network for series: gated recurrent units (Cho et al. 2014), and a linear head on the last state.

    Args:
        in_features: numbers at each time, 1 or more.
        out_features: classes, which the command line sets to the data's ``ways``, or numbers to predict.
        hidden_features: size of the state, 1 or more.
        layers: recurrent layers, 1 or more.
        bidirectional: also read each series backwards.

    Raises:
        SettingError: a size is below 1.

    Example:
        >>> GRUNet(in_features=3)(torch.rand(10, 50, 3)).shape
        torch.Size([10, 5])
    """

    def __init__(
        self,
        in_features: int = 1,
        out_features: int = 5,
        hidden_features: int = 64,
        layers: int = 1,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features, hidden_features=hidden_features, layers=layers)
        self.body = nn.GRU(in_features, hidden_features, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(hidden_features * (2 if bidirectional else 1), out_features)

    def forward(self, series: Tensor) -> Tensor:
        """Outputs ``[B, out_features]`` of series ``[B, L, in_features]``."""
        states = self.body(series)[1]  # [layers * directions, B, hidden_features]
        return self.head(torch.cat([*states[-2 if self.body.bidirectional else -1 :]], 1))


class ConvNet1d(nn.Module):
    """A convolutional network for series: blocks of convolution, batch normalization and ReLU, and a mean over time.

    It normalizes with the statistics of the current batch, as :class:`ConvNet` does. The length may vary.

    Args:
        in_features: numbers at each time, 1 or more.
        out_features: classes, which the command line sets to the data's ``ways``, or numbers to predict.
        hidden_channels: filters of each convolution, 1 or more.
        blocks: how many blocks, 1 or more; each but the first halves the length.
        kernel_size: times that a convolution sees, an odd number.

    Raises:
        SettingError: a size is below 1, or the kernel's is even.

    Example:
        >>> ConvNet1d(in_features=3)(torch.rand(10, 50, 3)).shape
        torch.Size([10, 5])
    """

    def __init__(
        self,
        in_features: int = 1,
        out_features: int = 5,
        hidden_channels: int = 64,
        blocks: int = 3,
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features, hidden_channels=hidden_channels)
        check_sizes(blocks=blocks, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise SettingError(f"model.net.kernel_size must be odd (got {kernel_size}); take {kernel_size + 1}.")
        layers: list[nn.Module] = []
        for block in range(blocks):
            sizes = (hidden_channels if block else in_features, hidden_channels, kernel_size)
            layers += [
                nn.Conv1d(*sizes, stride=2 if block else 1, padding=kernel_size // 2, bias=False),
                nn.BatchNorm1d(hidden_channels, track_running_stats=False),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(hidden_channels, out_features)

    def forward(self, series: Tensor) -> Tensor:
        """Outputs ``[B, out_features]`` of series ``[B, L, in_features]``."""
        return self.head(self.body(series.transpose(1, 2)).mean(2))


class TextNet(nn.Module):
    """A classifier of token ids: an embedding, transformer blocks, and a linear head on the mean over tokens.

    Without blocks the order of the tokens does not count. Blocks normalize first (Xiong et al. 2020).

    Args:
        vocabulary_size: how many token ids there are, 1 or more.
        out_features: classes; the command line sets it to the data's ``ways``.
        hidden_features: size of the embedding, a multiple of ``heads``.
        blocks: transformer blocks (Vaswani et al. 2017), 0 or more.
        heads: of attention in each block.
        max_length: longest text in tokens, where there are blocks.
        padding_token: id that fills short texts up and is left out; null where there is none.

    Raises:
        SettingError: an argument is out of range.

    Example:
        >>> TextNet(vocabulary_size=100, blocks=1)(torch.randint(100, (10, 20))).shape
        torch.Size([10, 5])
    """

    def __init__(
        self,
        vocabulary_size: int = 1000,
        out_features: int = 5,
        hidden_features: int = 64,
        blocks: int = 0,
        heads: int = 4,
        max_length: int = 128,
        padding_token: int | None = 0,
    ) -> None:
        super().__init__()
        check_sizes(vocabulary_size=vocabulary_size, out_features=out_features, hidden_features=hidden_features)
        check_sizes(heads=heads, max_length=max_length)
        if blocks < 0:
            raise SettingError(f"model.net.blocks must be at least 0 (got {blocks}); 0 takes the mean of embeddings.")
        if hidden_features % heads:
            raise SettingError(
                f"model.net.hidden_features must be a multiple of model.net.heads {heads} (got {hidden_features}); "
                f"take {heads * (hidden_features // heads + 1)}."
            )
        self.padding_token = padding_token
        self.embedding = nn.Embedding(vocabulary_size, hidden_features)
        self.position = nn.Parameter(0.02 * torch.randn(max_length, hidden_features)) if blocks else None
        self.body = nn.ModuleList(_TransformerBlock(hidden_features, heads) for _ in range(blocks))
        self.head = nn.Linear(hidden_features, out_features)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, out_features]`` of token ids ``[B, L]``, int64."""
        padding = self.padding_token
        present = torch.ones_like(tokens, dtype=torch.bool) if padding is None else tokens != padding
        x = self.embedding(tokens)
        if self.position is not None:
            if tokens.shape[1] > len(self.position):
                raise SettingError(
                    f"model.net.max_length is {len(self.position)}, but there are texts of {tokens.shape[1]} tokens; "
                    "raise it, or give shorter texts."
                )
            x = x + self.position[: tokens.shape[1]]
        for block in self.body:
            x = block(x, present)
        weights = present.to(x.dtype)[..., None]
        return self.head((x * weights).sum(1) / weights.sum(1).clamp_min(1))


class _TransformerBlock(nn.Module):
    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(features), nn.LayerNorm(features)
        self.projections, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """``[B, L, features]``, of which tokens ``present`` ``[B, L]`` are attended to."""
        parts = self.projections(self.attention_norm(x)).chunk(3, -1)
        queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mask = (~present).to(x.dtype)[:, None, None] * torch.finfo(x.dtype).min  # finite: a text may be empty
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))
