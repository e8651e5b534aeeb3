"""EfficientSAM3's image encoders, written out plainly from their authors' definition.

No other library has these models, so the export is compared with this: every layer in the order of
the original, nothing folded, enlarged before SAM 3's neck. The neck and the decoder are
transformers'.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainStudent(nn.Module):
    """A student encoder in place of the ViT of transformers' ``Sam3TrackerModel``.

    Args:
        backbone: ``"repvit"``, ``"tinyvit"`` or ``"efficientvit"``.
        tensors: its parameters by their names below ``trunk.model.``.
        grid: side of the map that the neck reads.
    """

    def __init__(self, backbone: str, tensors: dict[str, Tensor], grid: int) -> None:
        super().__init__()
        self.forward_backbone = {
            "repvit": self.repvit,
            "tinyvit": self.tinyvit,
            "efficientvit": self.efficientvit,
        }[backbone]
        self.grid = grid
        # As parameters, so that they move to a device with the model; names have no dots there.
        self.parameters_by_name = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(tensor, requires_grad=False)
                for name, tensor in tensors.items()
            }
        )

    def forward(self, pixels: Tensor) -> SimpleNamespace:
        """float32 [B, 3, S, S] to tokens [B, grid^2, 1024], as transformers' backbone."""
        x = self.forward_backbone(pixels)
        x = F.gelu(self.norm(self.conv(x, "head.0"), "head.1"))
        x = self.conv(x, "head.3", padding=1)
        size = (self.grid, self.grid)
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        return SimpleNamespace(last_hidden_state=x.flatten(2).transpose(1, 2))

    # --- layers -----------------------------------------------------------------------------------

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self.parameters_by_name[name.replace(".", "/")]
        return tensor

    def has(self, name: str) -> bool:
        return name.replace(".", "/") in self.parameters_by_name

    def count(self, prefix: str) -> int:
        """How many numbered children there are below a name."""
        start = prefix.replace(".", "/") + "/"
        names = [name for name in self.parameters_by_name if name.startswith(start)]
        return len({name.removeprefix(start).split("/")[0] for name in names})

    def conv(
        self, x: Tensor, name: str, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> Tensor:
        bias = self.get(name + ".bias") if self.has(name + ".bias") else None
        return F.conv2d(x, self.get(name + ".weight"), bias, stride, padding, groups=groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, variance = self.get(name + ".running_mean"), self.get(name + ".running_var")
        return F.batch_norm(x, mean, variance, self.get(name + ".weight"), self.get(name + ".bias"))

    def conv_bn(
        self, x: Tensor, name: str, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> Tensor:
        return self.norm(self.conv(x, name + ".c", stride, padding, groups), name + ".bn")

    # --- RepViT -----------------------------------------------------------------------------------

    def repvit(self, x: Tensor) -> Tensor:
        features = "backbone.model.features"
        x = F.gelu(self.conv_bn(x, features + ".0.0", 2, 1))
        x = self.conv_bn(x, features + ".0.2", 2, 1)
        for index in range(1, self.count(features)):
            block = f"{features}.{index}"
            mixer = block + ".token_mixer"
            width = x.shape[1]
            if self.has(mixer + ".0.conv1.weight"):
                y = self.conv_bn(x, mixer + ".0.conv", 1, 1, width)
                x = self.norm(
                    y + self.conv(x, mixer + ".0.conv1", groups=width) + x, mixer + ".0.bn"
                )
                if self.has(mixer + ".1.fc1.weight"):
                    y = x.mean((2, 3), keepdim=True)
                    y = self.conv(F.relu(self.conv(y, mixer + ".1.fc1")), mixer + ".1.fc2")
                    x = x * torch.sigmoid(y)
            else:
                x = self.conv_bn(x, mixer + ".0", 2, 1, width)
                x = self.conv_bn(x, mixer + ".2")
            y = F.gelu(self.conv_bn(x, block + ".channel_mixer.m.0"))
            x = x + self.conv_bn(y, block + ".channel_mixer.m.2")
        return x

    # --- TinyViT ----------------------------------------------------------------------------------

    def tinyvit(self, x: Tensor) -> Tensor:
        model = "backbone.model."
        x = F.gelu(self.conv_bn(x, model + "patch_embed.seq.0", 2, 1))
        x = self.conv_bn(x, model + "patch_embed.seq.2", 2, 1)
        for index in range(self.count(model + "layers.0.blocks")):
            block = f"{model}layers.0.blocks.{index}"
            y = F.gelu(self.conv_bn(x, block + ".conv1"))
            y = F.gelu(self.conv_bn(y, block + ".conv2", 1, 1, y.shape[1]))
            x = F.gelu(x + self.conv_bn(y, block + ".conv3"))
        for stage in range(1, self.count(model + "layers")):
            merge = f"{model}layers.{stage - 1}.downsample"
            x = F.gelu(self.conv_bn(x, merge + ".conv1"))
            x = F.gelu(self.conv_bn(x, merge + ".conv2", 2, 1, x.shape[1]))
            x = self.conv_bn(x, merge + ".conv3")
            for index in range(self.count(f"{model}layers.{stage}.blocks")):
                x = self.tinyvit_block(x, f"{model}layers.{stage}.blocks.{index}")
        return x

    def tinyvit_block(self, x: Tensor, block: str) -> Tensor:
        batch, width, height, _ = x.shape
        heads, count = self.get(block + ".attn.attention_biases").shape
        window = round(count**0.5)
        side = -(-height // window) * window
        y = F.pad(x, (0, side - height, 0, side - height)).permute(0, 2, 3, 1)
        y = y.unfold(1, window, window).unfold(2, window, window)  # [B, rows, columns, C, w, w]
        rows = y.shape[1]
        y = y.permute(0, 1, 2, 4, 5, 3).reshape(-1, window * window, width)
        y = self.tinyvit_attention(y, block + ".attn", heads, window)
        y = y.reshape(batch, rows, rows, window, window, width)
        y = y.permute(0, 5, 1, 3, 2, 4).reshape(batch, width, side, side)
        x = x + y[:, :, :height, :height]
        x = self.conv_bn(x, block + ".local_conv", 1, 1, width)
        y = self.layer_norm(x.permute(0, 2, 3, 1), block + ".mlp.norm")
        y = self.linear(F.gelu(self.linear(y, block + ".mlp.fc1")), block + ".mlp.fc2")
        return x + y.permute(0, 3, 1, 2)

    def tinyvit_attention(self, x: Tensor, name: str, heads: int, window: int) -> Tensor:
        tokens, width = x.shape[1:]
        x = self.linear(self.layer_norm(x, name + ".norm"), name + ".qkv")
        q, k, v = x.reshape(-1, tokens, heads, 3, width // heads).permute(3, 0, 2, 1, 4)
        # The original numbers offsets as it meets them, which is row by row from the first token.
        row, column = (
            axis.flatten() for axis in torch.meshgrid([torch.arange(window)] * 2, indexing="ij")
        )
        offset = (row[:, None] - row).abs() * window + (column[:, None] - column).abs()
        bias = self.get(name + ".attention_biases")[:, offset]
        scores = q @ k.transpose(-2, -1) * (width // heads) ** -0.5 + bias
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, tokens, width)
        return self.linear(mixed, name + ".proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.get(name + ".weight"), self.get(name + ".bias"))

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.get(name + ".weight"), self.get(name + ".bias"))

    # --- EfficientViT -----------------------------------------------------------------------------

    def efficientvit(self, x: Tensor) -> Tensor:
        model = "backbone.model."
        stem = model + "input_stem.op_list."
        x = F.hardswish(self.vit_conv(x, stem + "0", 2))
        for index in range(1, self.count(model + "input_stem.op_list")):
            x = x + self.bottleneck(x, f"{stem}{index}.main")
        for stage in range(self.count(model + "stages")):
            blocks = f"{model}stages.{stage}.op_list"
            x = self.bottleneck(x, blocks + ".0.main", 2)
            for index in range(1, self.count(blocks)):
                block = f"{blocks}.{index}"
                if self.has(block + ".context_module.main.qkv.conv.weight"):
                    x = x + self.lite_mla(x, block + ".context_module.main")
                    x = x + self.bottleneck(x, block + ".local_module.main")
                else:
                    x = x + self.bottleneck(x, block + ".main")
        return x

    def vit_conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        padding = self.get(name + ".conv.weight").shape[-1] // 2
        x = self.conv(x, name + ".conv", stride, padding, groups)
        return self.norm(x, name + ".norm") if self.has(name + ".norm.weight") else x

    def bottleneck(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        if self.has(name + ".inverted_conv.conv.weight"):
            x = F.hardswish(self.vit_conv(x, name + ".inverted_conv"))
        x = F.hardswish(self.vit_conv(x, name + ".depth_conv", stride, x.shape[1]))
        return self.vit_conv(x, name + ".point_conv")

    def lite_mla(self, x: Tensor, name: str) -> Tensor:
        batch, _, height, width = x.shape
        qkv = self.vit_conv(x, name + ".qkv")
        dim = self.get(name + ".aggreg.0.1.weight").shape[1]
        wide = self.conv(qkv, name + ".aggreg.0.0", 1, 2, qkv.shape[1])
        wide = self.conv(wide, name + ".aggreg.0.1", groups=qkv.shape[1] // dim)
        groups = torch.cat([qkv, wide], 1).reshape(batch, -1, 3 * dim, height * width)
        q, k, v = groups[:, :, :dim], groups[:, :, dim : 2 * dim], groups[:, :, 2 * dim :]
        q, k = F.relu(q), F.relu(k)
        v = F.pad(v, (0, 0, 0, 1), value=1.0)
        out = v @ k.transpose(-2, -1) @ q
        out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
        return self.vit_conv(out.reshape(batch, -1, height, width), name + ".proj")
