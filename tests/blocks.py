"""Small networks of the blocks that multimodal networks are built of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import Inputs
from torch import Tensor, nn
from torch.nn import functional as F


class CnnTransformer(nn.Module):
    """A convolution into PyTorch's own encoder, and a second input that is flattened into a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.small = nn.Conv2d(1, 16, 3, padding=1)
        self.flat = nn.Linear(16 * 16, 64)
        self.patch = nn.Conv2d(32, 64, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 64))
        self.register_buffer("position", torch.randn(1, 5, 64), persistent=False)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        x = self.patch(F.relu(self.conv(image))).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.position
        side = self.flat(F.relu(self.small(depth)).flatten(1))
        return self.head(self.encoder(x)[:, 0] + side)


class Fusion(nn.Module):
    """Depthwise and grouped convolutions, GroupNorm over a concatenation, and a recurrent branch."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.PReLU(32))
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.two = nn.Conv2d(2, 64, 3, padding=1)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(6, 96)
        self.fuse = nn.Conv2d(96, 32, 1)
        self.embed = nn.Linear(7, 16)
        self.gru = nn.GRU(16, 24, batch_first=True)
        self.head = nn.Linear(32 + 24, 10)

    def forward(self, camera: Tensor, lidar: Tensor, speech: Tensor) -> Tensor:
        one = F.silu(self.depthwise(self.one(camera)))
        two = torch.sigmoid(self.grouped(F.relu(self.two(lidar))))
        both = F.relu(self.fuse(self.norm(torch.cat([one, two], 1)))).mean((2, 3))
        heard = self.gru(self.embed(speech))[0][:, -1]
        return self.head(torch.cat([both, heard], 1))


class Tied(nn.Module):
    """Text with an embedding tied to the layer that scores it, fused queries, and RMS norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.norm = nn.RMSNorm(64)
        self.num_heads = 4
        self.qkv = nn.Linear(64, 3 * 64, bias=False)
        self.proj = nn.Linear(64, 64)
        self.vocabulary = nn.Linear(64, 50, bias=False)
        self.vocabulary.weight = self.embed.weight
        self.head = nn.Linear(50, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(self.vocabulary(x).mean(1))


class Decoder(nn.Module):
    """PyTorch's own decoder: text asks an image, through attention layers of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.patch = nn.Embedding(50, 64), nn.Conv2d(3, 64, 8, 8)
        layer = nn.TransformerDecoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
        self.decoder, self.head = nn.TransformerDecoder(layer, 2), nn.Linear(64, 10)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        memory = self.patch(image).flatten(2).transpose(1, 2)
        return self.head(self.decoder(self.embed(tokens), memory).mean(1))


class CrossWidths(nn.Module):
    """An ``nn.MultiheadAttention`` whose keys and values have widths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image, self.audio = nn.Linear(8, 64), nn.Linear(6, 48), nn.Linear(5, 32)
        self.ask = nn.MultiheadAttention(64, 4, kdim=48, vdim=32, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, text: Tensor, image: Tensor, audio: Tensor) -> Tensor:
        x = F.relu(self.text(text))
        return self.head((x + self.ask(x, F.relu(self.image(image)), F.relu(self.audio(audio)))[0]).mean(1))


class Attention(nn.Module):
    """The parts of an attention that its forms share."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, size

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


class Timm(Attention):
    """One layer for all, cut as timm does; its code takes the stream's width for its own."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(4, width // 4)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // 4), nn.LayerNorm(width // 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Gated(Attention):
    """One layer for all, with a gate and a norm of the result."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(4, 16)
        self.qkv, self.gate, self.norm, self.proj = (
            nn.Linear(width, 192), nn.Linear(width, 64), nn.LayerNorm(64), nn.Linear(64, width)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, -1))
        return self.proj(self.norm(self.mix(q, k, v)) * self.gate(x).sigmoid())


class HeadByHead(Attention):
    """One layer for all, its outputs sorted by heads (GPT-NeoX, BLOOM)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(4, 16)
        self.query_key_value, self.dense = nn.Linear(width, 192), nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(x).unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2)
        return self.dense(self.mix(*parts.chunk(3, -1)))


class Grouped(Attention):
    """Pairs of queries share keys and values."""

    def __init__(self, width: int = 64, keys: int = 2) -> None:
        super().__init__(4, 16)
        self.num_key_value_heads = keys
        self.q_proj, self.o_proj = nn.Linear(width, 64), nn.Linear(64, width)
        self.k_proj, self.v_proj = nn.Linear(width, 16 * keys), nn.Linear(width, 16 * keys)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.mix(q, k, v, enable_gqa=True))


class OneKey(Grouped):
    """All queries share one head of keys and values."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(width, keys=1)


class KeysAndValues(Attention):
    """Queries from one layer, keys and values from another; a bias for every head and position."""

    def __init__(self, width: int = 64) -> None:
        super().__init__(4, 16)
        self.to_q, self.to_kv, self.to_out = nn.Linear(width, 64), nn.Linear(width, 128), nn.Linear(64, width)
        self.position_bias = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = self.split(self.to_q(x)), map(self.split, self.to_kv(x).chunk(2, -1))
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5 + self.position_bias
        return self.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Two blocks of one of these attentions, as in a transformer."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(8, 64), nn.Linear(64, 10)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm1": nn.LayerNorm(64), "attention": attention(), "norm2": nn.LayerNorm(64),
                           "up": nn.Linear(64, 128), "down": nn.Linear(128, 64)})
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.head(x.mean(1))


class CoAttention(Attention):
    """Two streams that ask each other, in one module with one count of heads (ViLBERT)."""

    def __init__(self) -> None:
        super().__init__(4, 16)
        self.image, self.text = nn.Linear(6, 64), nn.Linear(8, 48)
        self.query1, self.key1, self.value1 = (nn.Linear(64, 64) for _ in range(3))
        self.query2, self.key2, self.value2 = (nn.Linear(48, 64) for _ in range(3))
        self.dense1, self.dense2, self.head = nn.Linear(64, 64), nn.Linear(64, 48), nn.Linear(112, 10)

    def part(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x, y = self.image(image).tanh(), self.text(text).tanh()
        seen = self.mix(self.part(self.query2(y)), self.part(self.key1(x)), self.part(self.value1(x)))
        read = self.mix(self.part(self.query1(x)), self.part(self.key2(y)), self.part(self.value2(y)))
        x, y = x + self.dense1(read), y + self.dense2(seen)
        return self.head(torch.cat([x.mean(1), y.mean(1)], 1))


class GatedFusion(nn.Module):
    """Branches joined along the last dimension of tokens, gated by one another, through a gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.shared = nn.Linear(6, 64), nn.Linear(8, 64), nn.Linear(5, 32)
        self.gate, self.mixed, self.halves = nn.Linear(128, 64), nn.Linear(128, 96), nn.Linear(96, 128)
        self.twice, self.head = nn.Linear(64, 64), nn.Linear(64 + 64 + 5, 10)

    def forward(self, image: Tensor, text: Tensor, left: Tensor, right: Tensor) -> Tensor:
        x, y = self.image(image).tanh(), self.text(text).tanh()
        gate = self.gate(torch.cat([x, y], 2)).sigmoid()
        fused = gate * x + (1 - gate) * y
        unit = F.glu(self.halves(F.relu(self.mixed(torch.cat([fused, x], dim=2)))), -1)
        pair = F.relu(self.twice(torch.cat([self.shared(left).tanh(), self.shared(right).tanh()], 2)))
        return self.head(torch.cat([unit, left, pair], -1).mean(1))


class Recurrent(nn.Module):
    """A two-way LSTM, a GRU that starts from zeros of the module's own width, and a cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 32
        self.embed = nn.Linear(7, 48)
        self.lstm = nn.LSTM(48, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.gru, self.cell = nn.GRU(64, 32), nn.GRUCell(7, 32)
        self.head = nn.Linear(32 + 64 + 32, 10)

    def forward(self, speech: Tensor) -> Tensor:
        steps, (last, _) = self.lstm(F.relu(self.embed(speech)))
        start = torch.zeros(1, speech.shape[0], self.hidden)
        heard, _ = self.gru(steps.transpose(0, 1), start)
        state = torch.zeros(speech.shape[0], self.cell.hidden_size)
        for step in speech.unbind(1):
            state = self.cell(step, state)
        return self.head(torch.cat([heard[-1], last[-2], last[-1], state], 1))


class Temporal(nn.Module):
    """A temporal convolutional network (Bai et al., 2018): causal, dilated, weight-normalised."""

    def __init__(self) -> None:
        super().__init__()
        norm, sizes = nn.utils.parametrizations.weight_norm, [(12, 32), (32, 32), (32, 48)]
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"one": norm(nn.Conv1d(a, b, 3, padding=2 << i, dilation=1 << i)),
                           "two": norm(nn.Conv1d(b, b, 3, padding=2 << i, dilation=1 << i)),
                           "skip": nn.Conv1d(a, b, 1)})
            for i, (a, b) in enumerate(sizes)
        )  # fmt: skip
        self.head = nn.Linear(48, 10)

    def forward(self, signal: Tensor) -> Tensor:
        x = signal
        for block in self.blocks:
            length = x.shape[-1]
            y = F.relu(block["one"](x)[:, :, :length])
            x = F.relu(block["two"](y)[:, :, :length] + block["skip"](x))
        return self.head(x[:, :, -1])


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Convolutions(nn.Module):
    """ConvNeXt and ShuffleNet in small: depthwise and grouped convolutions, norms of every kind, squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 32
        self.stem, self.norm = nn.Conv2d(3, 32, 2, 2), ChannelNorm(32)
        self.depthwise, self.token_norm = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.LayerNorm(32)
        self.up, self.down, self.scale = nn.Linear(32, 128), nn.Linear(128, 32), nn.Parameter(torch.ones(32))
        self.grouped, self.group_norm = nn.Conv2d(32, 64, 3, padding=1, groups=4), nn.GroupNorm(8, 64)
        self.squeeze, self.excite = nn.Linear(64, 16), nn.Linear(16, 64)
        self.unused, self.up_again = nn.Linear(64, 24), nn.ConvTranspose2d(64, 48, 2, 2)
        self.instance, self.head = nn.InstanceNorm2d(48, affine=True), nn.Linear(48, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.stem(image))
        y = self.token_norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
        x = x.view(x.shape[0], self.width, -1).view(x.shape)
        x = F.relu(self.group_norm(self.grouped(x)))
        pooled = x.mean((2, 3))
        self.unused(pooled)
        x = x * self.excite(F.relu(self.squeeze(pooled))).sigmoid()[:, :, None, None]
        return self.head(F.relu(self.instance(self.up_again(x))).mean((2, 3)))


class OpenClip(nn.Module):
    """CLIP as first released: bare parameters as projections, tokens first, PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 8, 8, bias=False)
        self.class_embedding, self.position = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(17, 64))
        self.norm1, self.norm2, self.attention = nn.LayerNorm(64), nn.LayerNorm(64), nn.MultiheadAttention(64, 4)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.proj, self.head = nn.Parameter(torch.randn(64, 48) / 8), nn.Linear(48, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).permute(0, 2, 1)
        first = self.class_embedding + torch.zeros(x.shape[0], 1, x.shape[-1])
        x = (torch.cat([first, x], dim=1) + self.position).permute(1, 0, 2)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(F.relu(x.permute(1, 0, 2)[:, 0] @ self.proj))


def _stacked(attention: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, Inputs]]:
    return lambda: (Stack(attention), {"x": (6, 8)})


class RotaryAttention(nn.Module):
    """Grouped queries with rotary embeddings as most write them: a concatenation of sums of products of halves."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 8, 4, 8
        self.q_proj, self.o_proj = nn.Linear(64, 64), nn.Linear(64, 64)
        self.k_proj, self.v_proj = nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self._turned(self.q_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2))
        k = self._turned(self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2))
        v = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        k, v = (part.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for part in (k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1))

    @staticmethod
    def _turned(x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        angle = torch.arange(x.shape[2])[:, None] / 100 ** (torch.arange(one.shape[-1]) / one.shape[-1])
        return torch.cat([one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()], -1)


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.attention = nn.Embedding(50, 64), nn.RMSNorm(64), RotaryAttention()
        self.mlp = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))
        self.head = nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        return self.head((x + self.mlp(x)).mean(1))


class Flattened(nn.Module):
    """Pixels flattened with the channels and joined with another sensor's features."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.inertial = nn.Sequential(nn.Linear(6, 64), nn.ReLU())
        self.fusion, self.head = nn.Linear(576, 64), nn.Linear(64, 10)

    def forward(self, image: Tensor, motion: Tensor) -> Tensor:
        both = torch.cat([self.camera(image).flatten(1), self.inertial(motion)], 1)
        return self.head(F.relu(self.fusion(both)))


class UNet(nn.Module):
    """An image to an image: skip connections are concatenated on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = _conv(3, 32), _conv(32, 64, 2), _conv(64, 96, 2)
        self.up_two, self.back_two = nn.ConvTranspose2d(96, 64, 2, 2), _conv(128, 64)
        self.up_one, self.back_one = nn.ConvTranspose2d(64, 32, 2, 2), _conv(64, 32)
        self.head = nn.Conv2d(32, 10, 1)

    def forward(self, image: Tensor) -> Tensor:
        one = self.one(image)
        two = self.two(one)
        x = self.back_two(torch.cat([self.up_two(self.three(two)), two], 1))
        return self.head(self.back_one(torch.cat([self.up_one(x), one], 1)))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


BLOCKS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "encoder": lambda: (CnnTransformer(), {"image": (3, 8, 8), "depth": (1, 4, 4)}),
    "decoder": lambda: (Decoder(), {"tokens": (5,), "image": (3, 32, 32)}),
    "cross_widths": lambda: (CrossWidths(), {"text": (5, 8), "image": (6, 6), "audio": (6, 5)}),
    "timm": _stacked(Timm),
    "gated": _stacked(Gated),
    "head_by_head": _stacked(HeadByHead),
    "grouped": _stacked(Grouped),
    "one_key": _stacked(OneKey),
    "keys_and_values": _stacked(KeysAndValues),
    "co_attention": lambda: (CoAttention(), {"image": (5, 6), "text": (7, 8)}),
    "gated_fusion": lambda: (GatedFusion(), {"image": (5, 6), "text": (5, 8), "left": (5, 5), "right": (5, 5)}),
    "fusion": lambda: (Fusion(), {"camera": (3, 8, 8), "lidar": (2, 8, 8), "speech": (5, 7)}),
    "recurrent": lambda: (Recurrent(), {"speech": (5, 7)}),
    "temporal": lambda: (Temporal(), {"signal": (12, 20)}),
    "convolutions": lambda: (Convolutions(), {"image": (3, 16, 16)}),
    "rotary": lambda: (Rotary(), {"tokens": (6,)}),
    "flattened": lambda: (Flattened(), {"image": (1, 16, 16), "motion": (6,)}),
    "unet": lambda: (UNet(), {"image": (3, 16, 16)}),
    "open_clip": lambda: (OpenClip(), {"image": (3, 32, 32)}),
}
