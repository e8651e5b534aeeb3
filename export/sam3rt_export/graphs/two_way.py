"""The blocks of SAM's two-way transformer: prompt tokens and image tokens attend to each other.

The arithmetic is the reference's. The cross-attentions are rearranged, because there are thousands
of image tokens and about ten prompt tokens: a head's projections of the image are applied to its
few queries, or to what its few weights mixed, so the image tokens are never projected. Per layer,
four matmuls of [tokens x heads, 256] with the image replace four of [image tokens, 256 x 128],
which halves the work at one click. Biases that shift all scores of one softmax row alike are
dropped, since the softmax cannot see them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .operators import Linear, layer_norm, regroup, split_heads

Pair = tuple[Tensor, Tensor]

# Added to the scores of padding tokens. It is within FP16's range. A softmax in FP32 then gives
# exactly 0, as long as the other scores are above -29,000; this network's are nowhere near that.
PADDING_SCORE = -30000.0


class Attention(nn.Module):
    """The projections of one reference attention, and how to split them by head."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, heads: int) -> None:
        super().__init__()

        def get(name: str) -> tuple[Tensor, Tensor]:
            return tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.bias"]

        self.heads = heads
        self.inner = get("q_proj")[0].shape[0]
        self.head_dim = self.inner // heads
        self.scale = 1.0 / math.sqrt(self.head_dim)
        out, out_bias = get("out_proj")
        self._build(get("q_proj"), get("k_proj"), get("v_proj"), (out, out_bias))

    def _build(self, q: Pair, k: Pair, v: Pair, out: Pair) -> None:
        raise NotImplementedError

    def per_head(self, x: Tensor, tokens: int) -> Tensor:
        """[P, T, heads * d] to [P, heads, T, d]."""
        return split_heads(x, tokens, self.heads, self.head_dim)

    def merge_heads(self, x: Tensor, tokens: int) -> Tensor:
        """[P, heads, T, d] to [P, T, heads * d]."""
        return regroup(x.permute(0, 2, 1, 3), -1, tokens, self.inner)

    def head_rows(self, weight: Tensor) -> nn.Parameter:
        """A projection's weight [heads * d, C] as one matrix per head, [heads, d, C]."""
        return nn.Parameter(weight.reshape(self.heads, self.head_dim, -1).contiguous())


class SelfAttention(Attention):
    """Attention among the prompt tokens, in its plain form; padding is not attended to."""

    def _build(self, q: Pair, k: Pair, v: Pair, out: Pair) -> None:
        self.q = Linear(q[0].T * self.scale, q[1] * self.scale)
        self.k = Linear(k[0].T, k[1])
        self.v = Linear(v[0].T, v[1])
        self.out = Linear(out[0].T, out[1])

    def forward(self, query_key: Tensor, value: Tensor, padding: Tensor, tokens: int) -> Tensor:
        """query_key and value [P, T, C] and padding [P, 1, 1, T], to [P, T, C]."""
        q = self.per_head(self.q(query_key), tokens)
        k = self.per_head(self.k(query_key), tokens)
        v = self.per_head(self.v(value), tokens)
        weights = torch.softmax(torch.matmul(q, k.transpose(2, 3)) + padding, dim=-1)
        return self.out(self.merge_heads(torch.matmul(weights, v), tokens))


class TokenToImage(Attention):
    """Prompt tokens attend to image tokens, with the image left unprojected.

    Head h scores token t against image token x as ``q . (Wk x + bk)`` with ``q = Wq t + bq``. That
    is ``(Wk^T q) . x`` plus ``q . bk``, which is the same for every x, so the softmax does not see
    it. The weights mix the image tokens themselves; Wv follows, and its bias, as weights of a row
    sum to one.
    """

    def _build(self, q: Pair, k: Pair, v: Pair, out: Pair) -> None:
        self.width = k[0].shape[1]
        self.q = Linear(q[0].T * self.scale, q[1] * self.scale)
        self.k = self.head_rows(k[0])
        self.v = nn.Parameter(self.head_rows(v[0]).transpose(1, 2).contiguous())
        self.v_bias = nn.Parameter(v[1])
        self.out = Linear(out[0].T, out[1])

    def forward(self, query: Tensor, key: Tensor, value: Tensor, tokens: int) -> Tensor:
        """query [P, T, C], key and value [P or 1, X, C], to [P, T, C]."""
        rows = self.heads * tokens
        query = torch.matmul(self.per_head(self.q(query), tokens), self.k)
        scores = torch.matmul(regroup(query, -1, rows, self.width), key.transpose(1, 2))
        mixed = torch.matmul(torch.softmax(scores, dim=-1), value)
        mixed = torch.matmul(regroup(mixed, -1, self.heads, tokens, self.width), self.v)
        return self.out(self.merge_heads(mixed, tokens) + self.v_bias)


class ImageToToken(Attention):
    """Image tokens attend to prompt tokens, with the image left unprojected.

    Mirrors :class:`TokenToImage`: ``(Wq x + bq) . k`` with ``k = Wk t`` is ``x . (Wq^T k)`` plus
    ``bq . k``, which differs between the tokens of a softmax row and stays; bk drops out.
    """

    def _build(self, q: Pair, k: Pair, v: Pair, out: Pair) -> None:
        self.width = q[0].shape[1]
        self.k = nn.Parameter((k[0].T * self.scale).contiguous())
        self.q = self.head_rows(q[0])
        self.q_bias = nn.Parameter(q[1].reshape(self.heads, self.head_dim, 1))
        self.v = Linear(v[0].T, v[1])
        self.out = self.head_rows(out[0].T)
        # A head's weights sum to one, so that a share of the bias in each of its values adds up to
        # the bias. Values are few; the result has a row for each image token.
        self.out_bias = nn.Parameter(out[1] / self.heads)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor, tokens: int
    ) -> Tensor:
        """query [P or 1, X, C], key and value [P, T, C], padding [P, 1, T, 1], to [P, X, C]."""
        columns, image_tokens = self.heads * tokens, query.shape[1]
        key = self.per_head(torch.matmul(key, self.k), tokens)
        offset = regroup(torch.matmul(key, self.q_bias) + padding, -1, 1, columns)
        key = regroup(torch.matmul(key, self.q), -1, columns, self.width)
        value = torch.matmul(self.per_head(self.v(value), tokens), self.out) + self.out_bias
        scores = torch.matmul(query, key.transpose(1, 2)) + offset
        weights = torch.softmax(regroup(scores, -1, image_tokens, self.heads, tokens), dim=-1)
        weights = regroup(weights, -1, image_tokens, columns)
        return torch.matmul(weights, regroup(value, -1, columns, self.width))


class TwoWayBlock(nn.Module):
    """Self-attention, tokens to image, MLP, image to tokens."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, heads: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attention = SelfAttention(tensors, prefix + "self_attn.", heads)
        self.token_to_image = TokenToImage(tensors, prefix + "cross_attn_token_to_image.", heads)
        self.image_to_token = ImageToToken(tensors, prefix + "cross_attn_image_to_token.", heads)
        self.mlp = mlp(tensors, [prefix + "mlp.lin1", prefix + "mlp.lin2"])
        self.norms = nn.ModuleList(
            layer_norm(tensors, f"{prefix}norm{i}.", 1e-5) for i in range(1, 5)
        )

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        query_pe: Tensor,
        key_pe: Tensor,
        padding: Tensor,
        tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """Padding is [P, 1, T]: 0, or :data:`PADDING_SCORE` for a token that is not there."""
        keyed = padding[:, :, None]
        if self.first:
            queries = self.self_attention(queries, queries, keyed, tokens)
        else:
            queries = queries + self.self_attention(queries + query_pe, queries, keyed, tokens)
        queries = self.norms[0](queries)
        placed = keys + key_pe
        queries = self.norms[1](
            queries + self.token_to_image(queries + query_pe, placed, keys, tokens)
        )
        queries = self.norms[2](queries + self.mlp(queries))
        keys = self.norms[3](
            keys
            + self.image_to_token(placed, queries + query_pe, queries, padding[..., None], tokens)
        )
        return queries, keys


def mlp(tensors: Mapping[str, Tensor], names: list[str]) -> nn.Sequential:
    """Linear layers with ReLU between them, holding the tensors under ``names``."""
    layers: list[nn.Module] = []
    for name in names:
        if layers:
            layers.append(nn.ReLU())
        layers.append(Linear(tensors[name + ".weight"].T, tensors[name + ".bias"]))
    return nn.Sequential(*layers)
