"""An independent, plain implementation of the original SAM, after its paper, with the names of its checkpoints."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Mlp(nn.Module):
    def __init__(self, width, hidden, activation):
        super().__init__()
        self.lin1, self.lin2, self.activation = nn.Linear(width, hidden), nn.Linear(hidden, width), activation

    def forward(self, x):
        return self.lin2(self.activation(self.lin1(x)))


class Perceptron(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class EncoderAttention(nn.Module):
    """Full attention in a square of side x side tokens, with relative positions by row and by column."""

    def __init__(self, width, num_heads, side):
        super().__init__()
        self.num_heads, self.side = num_heads, side
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // num_heads))

    def forward(self, x):
        num_tokens = self.side**2
        rows = torch.arange(num_tokens) // self.side
        columns = torch.arange(num_tokens) % self.side
        q, k, v = self.qkv(x).view(len(x), num_tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        by_row = self.rel_pos_h[rows[:, None] - rows + self.side - 1]  # (N, N, D)
        by_column = self.rel_pos_w[columns[:, None] - columns + self.side - 1]
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + torch.einsum("bhnd,nmd->bhnm", q, by_row + by_column)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class EncoderBlock(nn.Module):
    def __init__(self, width, num_heads, window, grid):
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = EncoderAttention(width, num_heads, window or grid)
        self.mlp = Mlp(width, 4 * width, nn.GELU())

    def forward(self, x):  # (B, grid, grid, C)
        x = x + (self.windowed(self.norm1(x)) if self.window else self.attn(self.norm1(x)))
        return x + self.mlp(self.norm2(x))

    def windowed(self, x):
        grid, w = x.shape[1], self.window
        x = F.pad(x, (0, 0, 0, -grid % w, 0, -grid % w))
        for top in range(0, grid, w):
            for left in range(0, grid, w):
                x[:, top : top + w, left : left + w] = self.attn(x[:, top : top + w, left : left + w].clone())
        return x[:, :grid, :grid]


class ImageEncoder(nn.Module):
    def __init__(self, width, depth, num_heads, image_size, patch_size, window, global_layers, out):
        super().__init__()
        grid = image_size // patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        windows = [0 if i in global_layers else window for i in range(depth)]
        self.blocks = nn.ModuleList(EncoderBlock(width, num_heads, w, grid) for w in windows)
        convolutions = nn.Conv2d(width, out, 1, bias=False), nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.neck = nn.Sequential(
            convolutions[0], ChannelNorm(out, eps=1e-6), convolutions[1], ChannelNorm(out, eps=1e-6)
        )

    def forward(self, pixel_values):
        x = self.patch_embed["proj"](pixel_values).movedim(1, -1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.movedim(-1, 1))


class PromptEncoder(nn.Module):
    def __init__(self, out, image_size, mask_channels=16):
        super().__init__()
        self.image_size = image_size
        self.pe_layer = nn.Module()
        self.pe_layer.register_buffer("positional_encoding_gaussian_matrix", torch.zeros(2, out // 2))
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, out) for _ in range(4))
        self.not_a_point_embed, self.no_mask_embed = nn.Embedding(1, out), nn.Embedding(1, out)
        c = mask_channels
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, c // 4, 2, 2), ChannelNorm(c // 4, eps=1e-6), nn.GELU(),
            nn.Conv2d(c // 4, c, 2, 2), ChannelNorm(c, eps=1e-6), nn.GELU(), nn.Conv2d(c, out, 1),
        )  # fmt: skip

    def positions(self, xy):
        """Return random Fourier features of pixel coordinates (..., 2)."""
        angles = 2 * math.pi * (2 * xy / self.image_size - 1) @ self.pe_layer.positional_encoding_gaussian_matrix
        return torch.cat([angles.sin(), angles.cos()], -1)

    def forward(self, points=None, labels=None, boxes=None, mask=None):
        """Return sparse embeddings (P, tokens, C) and a dense embedding (1, C, H, W), or (1, C, 1, 1) without a mask.

        Points are (P, n, 2) with labels of 1 and 0, boxes (P, 4), the mask (1, 1, h, w).
        """
        sparse = []
        if points is not None:
            kind = torch.stack([embedding.weight[0] for embedding in self.point_embeddings])
            sparse.append(self.positions(points + 0.5) + kind[labels])
            if boxes is None:
                sparse.append(self.not_a_point_embed.weight.expand(len(points), 1, -1))
        if boxes is not None:
            corners = self.positions(boxes.view(-1, 2, 2) + 0.5)
            sparse.append(corners + torch.cat([self.point_embeddings[2].weight, self.point_embeddings[3].weight]))
        dense = self.no_mask_embed.weight[:, :, None, None] if mask is None else self.mask_downscaling(mask)
        return torch.cat(sparse, 1), dense


class DecoderAttention(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q, k, v):
        q, k, v = (
            f(x).unflatten(-1, (8, -1)).transpose(1, 2)
            for f, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    def __init__(self, width, mlp_dim):
        super().__init__()
        self.self_attn = DecoderAttention(width, width)
        self.cross_attn_token_to_image = DecoderAttention(width, width // 2)
        self.cross_attn_image_to_token = DecoderAttention(width, width // 2)
        self.mlp = Mlp(width, mlp_dim, nn.ReLU())
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))

    def forward(self, tokens, image, token_positions, image_positions, is_first):
        if is_first:  # here tokens and token_positions are equal
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_positions
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.norm1(tokens)
        image_keys = image + image_positions
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_positions, image_keys, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image_keys, tokens + token_positions, tokens))
        return tokens, image


class MaskDecoder(nn.Module):
    def __init__(self, width, mlp_dim, depth, num_masks, iou_hidden, iou_depth):
        super().__init__()
        self.iou_token, self.mask_tokens = nn.Embedding(1, width), nn.Embedding(num_masks + 1, width)
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(TwoWayBlock(width, mlp_dim) for _ in range(depth))
        self.transformer.final_attn_token_to_image = DecoderAttention(width, width // 2)
        self.transformer.norm_final_attn = nn.LayerNorm(width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, 2), ChannelNorm(width // 4, eps=1e-6), nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, 2), nn.GELU(),
        )  # fmt: skip
        self.output_hypernetworks_mlps = nn.ModuleList(
            Perceptron(width, width, width, width // 8) for _ in range(num_masks + 1)
        )
        self.iou_prediction_head = Perceptron(width, *[iou_hidden] * (iou_depth - 1), num_masks + 1)

    def forward(self, embedding, embedding_positions, sparse, dense):
        num_prompts, (channels, height, width) = len(sparse), embedding.shape[1:]
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        start = tokens = torch.cat([output_tokens.expand(num_prompts, -1, -1), sparse], 1)
        image = (embedding + dense).flatten(2).mT.expand(num_prompts, -1, -1)
        positions = embedding_positions.flatten(1).mT
        for i, layer in enumerate(self.transformer.layers):
            tokens, image = layer(tokens, image, start, positions, is_first=i == 0)
        tokens = tokens + self.transformer.final_attn_token_to_image(tokens + start, image + positions, image)
        tokens = self.transformer.norm_final_attn(tokens)
        upscaled = self.output_upscaling(image.mT.reshape(num_prompts, channels, height, width))
        kernels = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = torch.einsum("pmc,pchw->pmhw", torch.stack(kernels, 1), upscaled)
        return masks, self.iou_prediction_head(tokens[:, 0])


class OriginalSam(nn.Module):
    """A small SAM: 48 px in patches of 8, a 6x6 grid, windows of 4 that need padding.

    Its random weights are large enough for every part to affect the output.
    """

    def __init__(self, decoder_depth=2, num_masks=3, iou_depth=3):
        super().__init__()
        self.image_encoder = ImageEncoder(32, 4, 2, 48, 8, window=4, global_layers=(1, 3), out=32)
        self.prompt_encoder = PromptEncoder(32, 48)
        self.mask_decoder = MaskDecoder(32, 40, decoder_depth, num_masks, iou_hidden=24, iou_depth=iou_depth)
        generator = torch.Generator().manual_seed(0)
        for name, tensor in self.state_dict().items():
            tensor.normal_(std=1.0 if "pe_layer" in name else 0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(1)

    @torch.no_grad()
    def forward(self, pixel_values=None, embedding=None, multimask_output=True, **prompts):
        embedding = self.image_encoder(pixel_values) if embedding is None else embedding
        centres = 8 * (torch.arange(6, dtype=embedding.dtype) + 0.5)
        grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)  # (6, 6, xy)
        positions = self.prompt_encoder.positions(grid).movedim(-1, 0)
        masks, scores = self.mask_decoder(embedding, positions, *self.prompt_encoder(**prompts))
        outputs = slice(1, None) if multimask_output else slice(0, 1)
        return masks[:, outputs], scores[:, outputs]
