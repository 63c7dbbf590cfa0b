"""A small vision transformer: Dosovitskiy et al. (ICLR 2021), simplified like that of Beyer et al. (arXiv 2205.01580).

Fixed sine-cosine positions and the mean of the tokens in place of a class token mean fewer parameters to average, and
allow any image size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (what torch's own documentation calls it)

from flow_pl.errors import ConfigurationError
from flow_pl.models.dropout import Dropout
from flow_pl.models.lazy import inputs, outputs
from flow_pl.utils.validation import given, require_count, require_fraction


class VisionTransformer(nn.Sequential):
    """Patches, encoder layers, head; 137,674 parameters for 10 classes of 32x32 images with three channels.

    Routed blocks: patches, layer1, layer2, ..., head. Input [N, channels, height, width] or [N, height, width], with
    sides that `patch_size` divides: 28x28 becomes 49 tokens of 4x4 pixels, 32x32 becomes 64. The head gets the mean of
    the tokens, normalized.

    Args:
        num_classes: number of classes; null = that of the data.
        in_channels: channels of an image; null = those of the data.
        patch_size: pixels of a patch's side.
        width: width of a token; a multiple of 4 (for the positions) and of `heads`.
        depth: number of encoder layers.
        heads: number of attention heads.
        hidden: width of the hidden layer in each encoder layer; null = twice `width`.
        dropout: share dropped after the attention and after both linear layers of an encoder layer.

    Raises:
        ConfigurationError: a size is not positive, or `width` is not a multiple of 4 and of `heads`.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        in_channels: int | None = None,
        patch_size: int = 4,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        hidden: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        require_count(**given(num_classes=num_classes, in_channels=in_channels, hidden=hidden))
        require_count(patch_size=patch_size, width=width, depth=depth, heads=heads)
        require_fraction(dropout=dropout)
        if width % 4 or width % heads:
            raise ConfigurationError(f"width is {width}, expected a multiple of 4 and of heads ({heads}), such as 64.")
        super().__init__()
        self.add_module("patches", Patches(in_channels, patch_size, width))
        for i in range(1, depth + 1):
            self.add_module(f"layer{i}", EncoderLayer(width, heads, hidden or 2 * width, dropout))
        self.add_module("pool", TokenMean())
        # without weights, since the head has some
        self.add_module("norm", nn.LayerNorm(width, elementwise_affine=False))
        self.add_module("head", outputs(width, num_classes))


class Patches(nn.Module):
    """Embed the patches of an image and add their positions.

    Args:
        in_channels: channels of an image; None = those of the first image.
        size: pixels of a patch's side.
        width: width of a token.
    """

    def __init__(self, in_channels: int | None, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        # like a convolution with this stride, but a single product for many clients
        self.linear = inputs(None if in_channels is None else in_channels * size**2, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [N, H / size * W / size, width], row by row, for images x [N, channels, H, W] or [N, H, W].

        Raises:
            ConfigurationError: these are not images, or their sides are not multiples of the patch's.
        """
        p = self.size
        x = x.unsqueeze(1) if x.ndim == 3 else x
        if x.ndim != 4 or x.shape[2] % p or x.shape[3] % p:
            raise ConfigurationError(
                f"an instance has shape {list(x.shape[1:])}, expected (channels,) height and width, both multiples of "
                f"patch_size {p}: choose another patch_size, or pad the images."
            )
        rows, columns = x.shape[2] // p, x.shape[3] // p
        tokens = x.reshape(x.shape[0], -1, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        h: Tensor = self.linear(tokens)
        return h + positions(rows, columns, h.shape[-1], h.device).to(h.dtype)


def positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Compute sine and cosine of row and column at frequencies from 1 to 1 / 10,000 (Vaswani et al., NeurIPS 2017).

    Args:
        rows: number of rows of patches.
        columns: number of columns of patches.
        width: width of a token, a multiple of 4.
        device: device of the result.

    Returns:
        [rows * columns, width]: sines and cosines of the row, then of the column.
    """
    frequencies = 10_000 ** -(torch.arange(width // 4, device=device) / max(1, width // 4 - 1))
    axes = [torch.arange(n, device=device).unsqueeze(1) * frequencies for n in (rows, columns)]
    vertical, horizontal = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in axes)
    every = (rows, columns, width // 2)
    return torch.cat([vertical.unsqueeze(1).expand(every), horizontal.unsqueeze(0).expand(every)], dim=2).flatten(0, 1)


class EncoderLayer(nn.Module):
    """Attention and two linear layers, each added to its normalized input (Xiong et al., ICML 2020: norm first).

    Computes the same function as `torch.nn.TransformerEncoderLayer` with `norm_first`, `batch_first` and GELU.

    Args:
        width: width of a token.
        heads: number of attention heads; divides `width`.
        hidden: width between the linear layers.
        dropout: share dropped after the attention and after both linear layers.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Compute outputs [N, T, width] for tokens x [N, T, width]."""
        x = x + self.dropout(self._attention(self.norm1(x)))
        hidden = self.dropout(F.gelu(self.linear1(self.norm2(x))))
        outputs: Tensor = x + self.dropout(self.linear2(hidden))
        return outputs

    def _attention(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(x).view(*x.shape[:2], 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        # for clients side by side, the engine replaces it; see flow_pl.kernels.attention
        attended = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.projection(attended.transpose(1, 2).flatten(2))
        return projected


class TokenMean(nn.Module):
    """Averages over the tokens: [N, T, width] to [N, width]."""

    def forward(self, x: Tensor) -> Tensor:
        """Average over the tokens."""
        return x.mean(1)
