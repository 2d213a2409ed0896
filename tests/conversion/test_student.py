"""Students and original checkpoints. The original's architecture is written out here, from its paper, with its names."""

import argparse
import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import SamConfig, SamModel

from samlight_hf import SamLighteningConfig, SamLighteningModel
from samlight_hf.conversion import (
    change_image_size,
    convert_original_checkpoint,
    create_student,
    evenly_spaced_layers,
    initialize_positions,
    load_decoder,
    load_teacher,
    student_config,
)
from samlight_hf.loading import CheckpointError, load_model
from tests.conftest import tiny_config


# ----- the original SAM, in the plainest form -----


class ChannelNorm(nn.LayerNorm):
    """Over the channels of (B, C, H, W)."""

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
    """Every token of a side x side square sees every other, with a bias by the distance in rows and in columns."""

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
        """Random Fourier features of pixel coordinates (..., 2)."""
        angles = 2 * math.pi * (2 * xy / self.image_size - 1) @ self.pe_layer.positional_encoding_gaussian_matrix
        return torch.cat([angles.sin(), angles.cos()], -1)

    def forward(self, points=None, labels=None, boxes=None, mask=None):
        """Points (P, n, 2) with labels of 1 and 0, boxes (P, 4), one mask (1, 1, h, w) -> (P, tokens, C), (1, C, ?, ?)."""
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
        if is_first:  # the tokens are still their own positions
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
    """48 px in patches of 8: a 6x6 grid, windows of 4 that need padding; weights that make every part count."""

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
        kept = slice(1, None) if multimask_output else slice(0, 1)
        return masks[:, kept], scores[:, kept]


POINTS = torch.tensor([[[5.0, 9.0], [30.0, 41.0]], [[20.0, 3.0], [11.5, 40.0]], [[47.0, 0.0], [24.0, 24.0]]])
LABELS = torch.tensor([[1, 0], [1, 1], [0, 1]])
BOXES = torch.tensor([[2.0, 4.0, 40.0, 44.0], [10.0, 0.0, 20.0, 47.0], [30.5, 20.0, 47.0, 30.0]])
MASK = torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(2))
PIXELS = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(3))
PROMPTS = {
    "points": {"points": POINTS, "labels": LABELS},
    "boxes": {"boxes": BOXES},
    "points and boxes": {"points": POINTS, "labels": LABELS, "boxes": BOXES},
    "boxes and a mask": {"boxes": BOXES, "mask": MASK},
}


def double(prompts):
    return {name: value.double() if value.is_floating_point() else value for name, value in prompts.items()}


def assert_same(model, original, image, prompts, multimask_output=True):
    """The two agree to the precision of float64, in which rounding cannot hide a difference of the formulas."""
    model, original, prompts = model.double(), original.double(), double(prompts)
    names = {"points": "input_points", "labels": "input_labels", "boxes": "input_boxes"}
    inputs = {names[name]: value[None] for name, value in prompts.items() if name in names}
    if "mask" in prompts:
        inputs["input_masks"] = prompts["mask"]
    with torch.no_grad():
        outputs = model(
            **inputs, **{name: value.double() for name, value in image.items()}, multimask_output=multimask_output
        )
    masks, scores = original(
        image["pixel_values"].double() if "pixel_values" in image else None,
        image["image_embeddings"].double() if "image_embeddings" in image else None,
        multimask_output, **prompts,
    )  # fmt: skip
    assert masks.std() > 1e-3
    torch.testing.assert_close(outputs.pred_masks[0], masks, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outputs.iou_scores[0], scores, rtol=1e-9, atol=1e-9)


@pytest.fixture
def original():
    return OriginalSam().eval()


@pytest.fixture
def save(tmp_path):
    def write(content, name="sam.pth", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return write


# ----- original checkpoints -----


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_a_converted_model_computes_what_the_original_does(original, save, prompts, multimask_output):
    model = convert_original_checkpoint(save(original.state_dict()))
    assert_same(model, original, {"pixel_values": PIXELS}, prompts, multimask_output)


def test_the_shape_is_deduced_from_the_weights(save):
    original = OriginalSam(decoder_depth=3, num_masks=4, iou_depth=5).eval()
    model = convert_original_checkpoint(save(original.state_dict()))
    vision, decoder = model.config.vision_config, model.config.mask_decoder_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.mlp_dim) == (32, 4, 2, 128)
    assert (vision.image_size, vision.patch_size, vision.window_size, vision.global_attn_indexes) == (48, 8, 4, (1, 3))
    assert (decoder.num_hidden_layers, decoder.num_multimask_outputs, decoder.iou_head_depth) == (3, 4, 5)
    assert model.dtype == torch.float32 and not model.training
    embedding = model.prompt_encoder.shared_embedding.positional_embedding
    assert embedding is model.shared_image_embedding.positional_embedding
    assert_same(model, original, {"pixel_values": PIXELS}, PROMPTS["points"])


def test_windows_and_heads_are_asked_for_where_no_relative_positions_tell(original, save):
    state = original.state_dict()
    for name in [name for name in state if "rel_pos" in name]:
        state.pop(name).zero_()
    path = save(state)
    with pytest.raises(CheckpointError, match="no relative positions.*Give window_size"):
        convert_original_checkpoint(path)
    with pytest.raises(CheckpointError, match="hidden_size=32.*Give num_attention_heads"):
        convert_original_checkpoint(path, window_size=4, global_attn_indexes=(1, 3))
    model = convert_original_checkpoint(path, num_attention_heads=2, window_size=4, global_attn_indexes=(1, 3))
    assert_same(model, original, {"pixel_values": PIXELS}, PROMPTS["points"])


@pytest.mark.parametrize("kind", ["model", "state_dict", "module.", "trainer", "legacy", "float16"])
def test_checkpoints_are_found_as_people_save_them(original, save, kind):
    state, options = original.state_dict(), {}
    if kind == "float16":
        state = {name: tensor.half() for name, tensor in state.items()}
    content = dict(state)
    if kind in ("model", "state_dict"):
        content = {kind: state, "epoch": 3}
    elif kind == "module.":
        content = {f"module.{name}": tensor for name, tensor in state.items()}
    elif kind == "trainer":
        content = {"state_dict": {f"model.sam.{name}": tensor for name, tensor in state.items()}, "lr": [1e-4]}
    elif kind == "legacy":
        options = {"_use_new_zipfile_serialization": False}
    path = save(content, **options)
    model = convert_original_checkpoint(path)
    with open(path, "r+b") as file:  # the weights are in memory of their own, not the file's
        file.write(bytes(path.stat().st_size))
    weight = model.vision_encoder.layers[2].attn.qkv.weight
    assert torch.equal(weight, state["image_encoder.blocks.2.attn.qkv.weight"].float())


class CallsTheShell:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_is_refused_and_not_run(original, save, tmp_path):
    with pytest.raises(CheckpointError, match=r"sam.pth: needs the pickled object argparse.Namespace.*refused"):
        convert_original_checkpoint(save({"model": original.state_dict(), "args": argparse.Namespace(lr=1)}))
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        path = save({"model": original.state_dict(), "x": CallsTheShell(tmp_path / "ran")}, **options)
        for read in (convert_original_checkpoint, load_decoder, load_teacher):
            with pytest.raises(CheckpointError, match="can run code when read and is refused"):
                read(path)
    assert not (tmp_path / "ran").exists()


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


def endless():
    content = {}
    content["model"] = content
    return content


BROKEN = {
    "a missing weight": (lambda s: _without(s, "mask_decoder.iou_token.weight") | {"mask_decoder.iou_token.weights": 0}, "holds no original SAM"),
    "a missing block weight": (lambda s: _without(s, "image_encoder.blocks.2.norm1.bias"), "1 weights are missing, first vision_encoder.layers.2.layer_norm1.bias"),
    "a missing size": (lambda s: _without(s, "image_encoder.neck.0.weight"), "has no image_encoder.neck.0.weight"),
    "an unknown weight": (lambda s: s | {"image_encoder.extra": torch.ones(1)}, "image_encoder.extra does not belong"),
    "an unknown sequence weight": (lambda s: s | {"image_encoder.neck.4.weight": torch.ones(1)}, "image_encoder.neck.4.weight does not belong"),
    "a stray weight": (lambda s: {f"module.{k}": v for k, v in s.items()} | {"head.weight": torch.ones(1)}, "head.weight does not belong"),
    "a wrong shape": (lambda s: s | {"mask_decoder.output_upscaling.0.bias": torch.ones(9)}, r"output_upscaling.0.bias is \(9,\).*\(8,\)"),
    "a wrong number of dimensions": (lambda s: s | {"image_encoder.pos_embed": torch.ones(1, 36, 32)}, r"pos_embed is \(1, 36, 32\), not of 4"),
    "NaN": (lambda s: s | {"image_encoder.pos_embed": torch.full((1, 6, 6, 32), math.nan)}, "NaN or infinite values in image_encoder.pos_embed"),
    "integers": (lambda s: s | {"image_encoder.pos_embed": torch.ones(1, 6, 6, 32, dtype=torch.int8)}, "pos_embed is torch.int8"),
    "two sizes of windows": (lambda s: s | {"image_encoder.blocks.0.attn.rel_pos_h": torch.ones(5, 16)}, "windows of 3 and 4 tokens in an image of 6x6"),
    "a width that 8 heads cannot share": (lambda s: s | {"mask_decoder.transformer.final_attn_token_to_image.q_proj.weight": torch.ones(10, 32)}, "no SAM has these shapes"),
    "an endless nesting": (lambda s: endless(), "holds no original SAM checkpoint"),
    "no mapping": (lambda s: [torch.ones(1)], "holds no original SAM checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize(("breaks", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused(original, save, breaks, message):
    with pytest.raises(CheckpointError, match=message):
        convert_original_checkpoint(save(breaks(original.state_dict())))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing", "folder"])
def test_a_file_that_cannot_be_read_is_refused(original, save, damage):
    path = save(original.state_dict())
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello world " * 20}[damage]
        )
    message = "no such file" if damage in ("missing", "folder") else "truncated, damaged, or no file of torch.save"
    with pytest.raises(CheckpointError, match=message):
        convert_original_checkpoint(path)


def test_a_teacher_is_a_file_or_a_folder_in_safetensors(original, save, tmp_path):
    from_file, processor = load_teacher(save(original.state_dict()), device="cpu")
    from_file.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    assert (tmp_path / "teacher" / "model.safetensors").is_file()
    from_folder, processor = load_teacher(tmp_path / "teacher", device="cpu")
    assert processor.image_processor.pad_size["height"] == 48
    assert_same(from_folder, original, {"pixel_values": PIXELS}, PROMPTS["boxes"])
    assert load_teacher(tmp_path / "sam.pth", "cpu", "bfloat16")[0].dtype == torch.bfloat16
    for missing in (tmp_path / "none.pth", "none.pth"):
        with pytest.raises(CheckpointError, match="none.pth: no such file"):
            load_teacher(missing)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_teacher(tmp_path / "none")


def mobile_sam_state(original):
    """MobileSAM's layout: another image encoder, with batch norm's integers, before the original's decoder."""
    decoder = {k: v for k, v in original.state_dict().items() if not k.startswith("image_encoder.")}
    return {
        "image_encoder.patch_embed.seq.0.c.weight": torch.ones(4, 3, 3, 3),
        "image_encoder.patch_embed.seq.0.bn.num_batches_tracked": torch.tensor(0),
        "image_encoder.neck.0.weight": torch.ones(32, 16, 1, 1),
        **decoder,
    }


def test_a_student_of_mobile_sam_decodes_as_it_does(original, save):
    path = save(mobile_sam_state(original), "mobile_sam.pt")
    for read in (convert_original_checkpoint, load_teacher):
        with pytest.raises(CheckpointError, match="TinyViT.*load_decoder"):
            read(path)
    teacher = load_decoder(path, image_size=48, patch_size=8)
    student = create_student(teacher, config=student_config(teacher, hidden_size=48, num_hidden_layers=6))
    embedding = torch.randn(1, 32, 6, 6, generator=torch.Generator().manual_seed(4))
    for prompts in PROMPTS.values():
        assert_same(student, original, {"image_embeddings": embedding}, prompts)
    with pytest.raises(ValueError, match="SamDecoder, which has no image encoder"):
        create_student(teacher, initialize_from_teacher_layers=True)


def test_a_decoder_knows_its_frame(original, save):
    config = load_decoder(save(original.state_dict())).prompt_encoder_config
    assert (config.image_size, config.patch_size, config.image_embedding_size) == (48, 8, 6)
    config = load_decoder(save(mobile_sam_state(original))).prompt_encoder_config
    assert (config.image_size, config.patch_size, config.image_embedding_size) == (1024, 16, 64)
    with pytest.raises(CheckpointError, match="mask_decoder.hq does not belong"):
        load_decoder(save(mobile_sam_state(original) | {"mask_decoder.hq": torch.ones(1)}))


# ----- students -----


def sam_teacher(**vision_config):
    """A SAM of transformers, 8x8 tokens of 4x4 pixels, 6 layers with relative positions; every weight is random."""
    shape = tiny_config().vision_config
    vision_config = {
        "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": shape.image_size,
        "patch_size": shape.patch_size, "output_channels": 32, "num_pos_feats": 16, "window_size": 3,
        "global_attn_indexes": (2, 5), **vision_config,
    }  # fmt: skip
    config = SamConfig(
        vision_config=vision_config,
        prompt_encoder_config={"hidden_size": 32, "image_size": 32, "patch_size": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
    )
    torch.manual_seed(0)
    model = SamModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def teacher():
    return sam_teacher()


def decoder_state(model):
    parts = ("shared_image_embedding.", "prompt_encoder.", "mask_decoder.")
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(parts)}


@pytest.mark.parametrize(("preset", "depth"), [("tiny", 6), ("small", 9)])
def test_a_student_has_the_preset_s_encoder_and_the_teacher_s_decoder(teacher, preset, depth, tmp_path):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = create_student(teacher, preset)
    vision = student.config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.output_channels) == (
        384,
        depth,
        32,
        32,
    )
    assert not student.training and all(parameter.requires_grad for parameter in student.parameters())
    copied, own = decoder_state(student), decoder_state(teacher)
    assert copied.keys() == own.keys() and len(own) > 100
    assert all(torch.equal(copied[name], own[name]) for name in own)
    embeddings = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(5))
    prompts = {"image_embeddings": embeddings, "input_boxes": torch.tensor([[[2.0, 3.0, 20.0, 30.0]]] * 2)}
    with torch.no_grad():
        assert torch.equal(student(**prompts).pred_masks, teacher(**prompts).pred_masks)
        assert student.get_image_embeddings(torch.randn(1, 3, 32, 32)).std() > 0.1

    with torch.no_grad():  # the copy is the student's own
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    if preset == "tiny":
        create_student(teacher).save_pretrained(tmp_path)
        loaded, _ = load_model(tmp_path, "cpu")
        assert all(torch.equal(tensor, own[name]) for name, tensor in decoder_state(loaded).items())


def test_a_student_is_float32_whatever_the_teacher_and_the_config_are(teacher):
    config = tiny_config()
    config.dtype = torch.bfloat16
    rounded = sam_teacher().bfloat16()
    student = create_student(rounded, config=config, attn_implementation="eager")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.config.vision_config._attn_implementation == "eager"
    assert config.dtype == torch.bfloat16  # the caller's is not touched
    own = decoder_state(rounded)
    assert all(torch.equal(tensor, own[name].float()) for name, tensor in decoder_state(student).items())


def test_the_fresh_encoder_follows_the_seed(teacher):
    students = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        students.append(create_student(teacher, config=tiny_config()).vision_encoder.layers[0].attn.qkv.weight)
    assert torch.equal(students[0], students[1])
    assert not torch.equal(students[0], students[2])


def test_layers_come_from_evenly_spaced_layers_of_the_teacher(teacher):
    student = create_student(teacher, config=tiny_config(), initialize_from_teacher_layers=True)
    own, copied = teacher.vision_encoder.state_dict(), student.vision_encoder.state_dict()
    chosen = {"0": "0", "1": "3", "2": "5"}  # 3 layers of 6: 0, 2.5 and 5
    for name, tensor in copied.items():
        part, _, rest = name.partition(".")
        if part == "layers":
            index, _, rest = rest.partition(".")
            name = f"layers.{chosen[index]}.{rest}"
        assert torch.equal(tensor, own[name]), name
    decoders = decoder_state(student), decoder_state(teacher)
    assert all(torch.equal(tensor, decoders[1][name]) for name, tensor in decoders[0].items())


def test_all_layers_of_a_sam_lightening_are_the_teacher_again(model, config, pixel_values):
    student = create_student(model, config=config, initialize_from_teacher_layers=True)
    boxes = torch.tensor([[[2.0, 3.0, 20.0, 30.0]]] * 2)
    with torch.no_grad():
        outputs = [m(pixel_values, input_boxes=boxes).pred_masks for m in (student, model)]
    assert torch.equal(*outputs)


def test_a_patch_embedding_of_another_size_stays_fresh_and_says_so(teacher, caplog):
    config = tiny_config(image_size=64, patch_size=8)  # 8x8 tokens too
    student = create_student(teacher, config=config, initialize_from_teacher_layers=True)
    assert "patch_size=8 is not the teacher's 4: its patch embedding stays fresh" in caplog.text
    assert torch.equal(student.vision_encoder.pos_embed, teacher.vision_encoder.pos_embed)
    assert student.vision_encoder.patch_embed.projection.bias.abs().max() == 0  # as it is initialized


@pytest.mark.parametrize(
    ("teacher_layers", "student_layers", "expected"),
    [(12, 6, (0, 2, 4, 7, 9, 11)), (32, 6, (0, 6, 12, 19, 25, 31)), (5, 5, (0, 1, 2, 3, 4)), (7, 1, (6,)), (2, 2, (0, 1))],
)  # fmt: skip
def test_evenly_spaced_layers(teacher_layers, student_layers, expected):
    assert evenly_spaced_layers(teacher_layers, student_layers) == expected
    with pytest.raises(ValueError, match=f"student of {teacher_layers + 1} layers.*teacher of {teacher_layers}"):
        evenly_spaced_layers(teacher_layers, teacher_layers + 1)


@pytest.mark.parametrize(
    ("num_rows", "segment_length", "dilation_rate"),
    [(64, 512, 2), (32, 4 * 32, 2), (8, 8, 2), (14, 2 * 14, 2), (7, 7, 1), (63, 7 * 63, 1), (48, 6 * 48, 2)],
)
def test_a_preset_s_bands_are_an_eighth_of_any_image(teacher, num_rows, segment_length, dilation_rate):
    sized = argparse.Namespace(
        prompt_encoder=teacher.prompt_encoder, mask_decoder=teacher.mask_decoder, state_dict=dict,
        config=SamConfig(
            prompt_encoder_config={"hidden_size": 32, "image_size": 16 * num_rows}, mask_decoder_config={"hidden_size": 32}
        ),
    )  # fmt: skip
    config = student_config(sized, "tiny", layer_norm_eps=1e-5)
    patterns = config.vision_config.layer_patterns()
    assert [(p.segment_length, p.dilation_rate) for p in patterns[:2]] == [
        (segment_length, 1),
        (num_rows**2, dilation_rate),
    ]
    assert config.vision_config.layer_norm_eps == 1e-5
    if num_rows == 64:
        published = SamLighteningConfig.from_preset("tiny").vision_config
        assert patterns == published.layer_patterns()


def poisoned(value):
    model = sam_teacher()
    with torch.no_grad():
        model.vision_encoder.layers[4].mlp.lin2.bias[3] = value
    return model


def with_decoder(layer_norm_eps):
    config = tiny_config()
    config.mask_decoder_config.layer_norm_eps = layer_norm_eps
    return config


REFUSED = {
    "no SAM": (lambda t: {"teacher": nn.Linear(2, 2)}, "the teacher is a Linear, without SAM's prompt encoder"),
    "a vision model alone": (lambda t: {"teacher": t.vision_encoder}, "is a SamVisionEncoder, without SAM's"),
    "unknown preset": (lambda t: {"preset": "huge"}, "preset='huge' is not known. Use one of tiny, small, base"),
    "preset and config": (lambda t: {"preset": "tiny", "config": tiny_config()}, "Give one of them"),
    "another config": (lambda t: {"config": t.config}, "config is a SamConfig. Use a SamLighteningConfig"),
    "NaN": (lambda t: {"teacher": poisoned(math.nan)}, "NaN or infinite values in vision_encoder.layers.4.mlp.lin2.bias"),
    "inf": (lambda t: {"teacher": poisoned(-math.inf)}, "NaN or infinite values in vision_encoder.layers.4"),
    "embedding channels": (lambda t: {"config": tiny_config(output_channels=64, num_pos_feats=32)}, "output_channels=64 must equal the teacher's 32"),
    "embedding grid": (lambda t: {"config": tiny_config(image_size=64)}, "image_size // patch_size=16 must equal the teacher's 8"),
    "decoder arithmetic": (lambda t: {"config": with_decoder(layer_norm_eps=1e-3)}, "mask_decoder_config.layer_norm_eps=0.001 must equal the teacher's 1e-06"),
    "widths": (lambda t: {"preset": "tiny", "initialize_from_teacher_layers": True}, "hidden_size=384 and the teacher's 32 must agree"),
    "mlp widths": (lambda t: {"config": tiny_config(mlp_dim=64), "initialize_from_teacher_layers": True}, "mlp_dim=64 and the teacher's 128 must agree"),
    "depths": (lambda t: {"config": tiny_config(num_hidden_layers=7, segment_length=None, dilation_rate=2), "initialize_from_teacher_layers": True}, "student of 7 layers.*teacher of 6"),
    "no positions": (lambda t: {"config": tiny_config(use_abs_pos=False), "initialize_from_teacher_layers": True}, "the student has no place for, first vision_encoder.pos_embed"),
    "positions missing": (lambda t: {"teacher": sam_teacher(use_abs_pos=False), "config": tiny_config(), "initialize_from_teacher_layers": True}, "lacks 1 weights.*vision_encoder.pos_embed"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_student_is_refused(teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_student(**{"teacher": teacher, **arguments(teacher)})


def test_what_a_teacher_s_decoder_has_more_or_less_is_refused():
    more = sam_teacher()
    more.mask_decoder.hq_token = nn.Embedding(1, 32)
    with pytest.raises(ValueError, match=r"no place for, first mask_decoder.hq_token.weight"):
        create_student(more, config=tiny_config())
    less = sam_teacher()
    del less.mask_decoder.iou_token
    with pytest.raises(
        ValueError, match=r"lacks 1 weights that the student needs, first mask_decoder.iou_token.weight"
    ):
        create_student(less, config=tiny_config())


def test_two_positional_embeddings_where_sam_has_one_are_refused():
    torn = sam_teacher()
    shared = torn.shared_image_embedding.positional_embedding
    torn.prompt_encoder.shared_embedding.positional_embedding = nn.Parameter(shared.detach() + 1)
    with pytest.raises(ValueError, match="is not the teacher's after loading.*tie_weights"):
        create_student(torn, config=tiny_config())
    torn.tie_weights()
    assert isinstance(create_student(torn, config=tiny_config()), SamLighteningModel)


@pytest.mark.parametrize(
    "make", [lambda: SamLighteningModel(tiny_config()), lambda: sam_teacher(use_rel_pos=False, window_size=0)]
)
def test_another_image_size(make):
    model = make().eval()
    torch.nn.init.normal_(model.vision_encoder.pos_embed)
    larger = change_image_size(model, 64)
    assert larger.config.vision_config.image_size == larger.config.prompt_encoder_config.image_size == 64
    assert larger.vision_encoder.pos_embed.shape[1:3] == (16, 16)
    weights = model.state_dict()
    for name, tensor in larger.state_dict().items():
        assert torch.equal(tensor, weights[name]) == (name != "vision_encoder.pos_embed"), name
    outputs = larger(torch.randn(1, 3, 64, 64), input_points=torch.tensor([[[[20.0, 50.0]]]]))
    assert outputs.pred_masks.shape[-2:] == (64, 64)
    back = change_image_size(larger, 32)  # smooth positions survive the way there and back
    assert back.config.to_dict() == model.config.to_dict()
    if isinstance(model, SamLighteningModel):
        assert larger.config.vision_config.segment_length == (None, 64, None)


def test_positions_begin_as_waves_that_tell_every_place(model):
    initialize_positions(model)
    positions = model.vision_encoder.pos_embed.detach()[0].flatten(0, 1)  # (N, C)
    distances = torch.cdist(positions, positions) + torch.eye(len(positions)) * 1e3
    assert distances.min() > 0.5
    quarter = positions.shape[1] // 4
    frequencies = 10000.0 ** -(torch.arange(quarter) / quarter)
    row, column = 3, 5
    expected = torch.cat([wave(n * frequencies) for n in (row, column) for wave in (torch.sin, torch.cos)])
    torch.testing.assert_close(positions[row * 8 + column], expected)


def test_an_image_size_that_cannot_be():
    with pytest.raises(ValueError, match="patch_size=4 must divide image_size=30"):
        change_image_size(SamLighteningModel(tiny_config()), 30)
    with pytest.raises(ValueError, match="use_rel_pos=True cannot change its size"):
        change_image_size(sam_teacher(), 64)
