"""The classes of an optimized model and of its image encoder, which run fast paths where they support a call."""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.sam.modeling_sam import SamImageSegmentationOutput, SamVisionEncoderOutput

from ..kernels.linear import load_convolution
from ..kernels.support import compiling_ahead, only_compiling
from ..kernels.tokens import MOST_PROMPTS
from ..utils.packing import packed_bytes
from ..utils.turns import turn
from .cuda_graphs import GraphedFunction, GraphMemory, part_size, parts_of
from .image_encoder import MOST_IMAGES, FastVisionEncoder, make_encoder, why_not_fast_encoder, why_not_kernels
from .mask_decoder import FastMaskDecoder


# Reads an attribute of a config without a look for another name of it, which takes longer than to launch a kernel. The
# attributes that are read here have one name.
_read = object.__getattribute__

# The classes below are mixins: `optimized_class` puts a model's class behind them.
_Module: Any = PreTrainedModel if TYPE_CHECKING else object


@dataclass
class OptimizationReport:
    """The way in which the parts of an optimized model run, and the cost of its CUDA graphs.

    Attributes:
        encoder: "fused", or "plain" and the reason.
        decoder: The same for the mask decoder.
        num_graphs: The number of graphs captured by `optimize`.
        warm_up_seconds: The time that capturing them took.
        graph_memory_mb: The memory that torch keeps for them alone, in MB of 2**20 bytes.
        num_graphs_when_needed: The number of graphs that are captured at the first call that needs them.
    """

    encoder: str
    decoder: str = "fused"
    num_graphs: int = 0
    warm_up_seconds: float = 0.0
    graph_memory_mb: float = 0.0
    num_graphs_when_needed: int = 0

    def __str__(self) -> str:
        later = f"; {self.num_graphs_when_needed} more when needed" if self.num_graphs_when_needed else ""
        return (
            f"encoder: {self.encoder}; decoder: {self.decoder}; {self.num_graphs} CUDA graphs in "
            f"{self.graph_memory_mb:.0f} MB, made in {self.warm_up_seconds:.1f} s{later}"
        )


class PlannedGraph(NamedTuple):
    """A graph that `optimize` captures, now or when it is needed.

    Attributes:
        name: What it computes, for the progress bar.
        function: The function that captures it.
        make_inputs: Makes inputs of its shapes and dtypes on a device.
        num_bytes: About how large its largest intermediate result is.
        result_bytes: The size of the result that shares memory with those of other graphs.
    """

    name: str
    function: GraphedFunction
    make_inputs: Callable[[torch.device], list[torch.Tensor]]
    num_bytes: int
    result_bytes: int = 0


def shown(steps: Sequence[str], progress: bool) -> Iterator[str]:
    """Yield the names of steps, with a progress bar that shows the one in work."""
    with tqdm(total=len(steps), desc="optimize", unit="step", disable=not progress) as bar:
        for step in steps:
            bar.set_postfix_str(step)
            yield step
            bar.update()


def in_order(graphs: Sequence[PlannedGraph]) -> list[PlannedGraph]:
    """Sort graphs, the largest first: the others then find room in its memory, which none of them would leave to it."""
    return sorted(graphs, key=lambda graph: graph.num_bytes, reverse=True)


class FastPaths:
    """The fast encoder and decoder of an optimized model.

    Graphs have one set of buffers, so callers take turns, see `utils.turns.turn`.

    Args:
        model: The optimized model, in its final dtype.
        decoder: Its mask decoder, or None if the model runs its own.
        image_batch_sizes: Numbers of images for which the encoder gets a graph.
        prompt_counts: Numbers of prompts for which the decoder gets graphs.
        when_needed: Capture a graph at the first call that needs it, instead of now.
        progress: Show a progress bar while graphs are captured.
        skip_padding: See `make_encoder`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: FastMaskDecoder | None,
        image_batch_sizes: Sequence[int],
        prompt_counts: Sequence[int],
        when_needed: bool = False,
        progress: bool = False,
        skip_padding: bool = False,
    ):
        self.device, self.dtype = model.device, model.dtype
        self._warned: set[str] = set()
        config = model.config.vision_config
        self.image_shape = config.num_channels, config.image_size, config.image_size
        self.features = (config.image_size // config.patch_size) ** 2 * max(config.mlp_dim, 3 * config.hidden_size)
        self.decoder = decoder
        on_cuda = self.device.type == "cuda"
        self.memory = decoder.graph_memory if decoder else GraphMemory() if on_cuda else None
        start = time.perf_counter()
        captures, sizes = on_cuda and not when_needed, (image_batch_sizes, prompt_counts)
        make = partial(make_encoder, model, on_cuda, self.memory, skip_padding)
        made = make() if skip_padding else None  # that depends on whether the fused encoder really runs
        with self._compiled_at_the_same_time(config) if on_cuda else contextlib.nullcontext():
            self.encode, self.copied = made or make()
            graphs = self.graphs(*sizes)
            if decoder is not None:
                _ = decoder.why_not_triton  # asked for, so that the kernels of its attempts are compiled
            steps = shown(["compiling kernels", *(f"capturing {graph.name}" for graph in in_order(graphs))], progress)
            if captures:
                next(steps)
                for graph in graphs:
                    graph.function.compile(*graph.make_inputs(self.device))
        is_fused = isinstance(self.copied, FastVisionEncoder)
        reason = why_not_kernels(model) if is_fused else why_not_fast_encoder(model)
        if is_fused and reason:  # its kernels do not run after all
            self.encode, self.copied = make()
            graphs = self.graphs(*sizes)
        if decoder is not None:
            decoder.try_kernels()
        self._weights = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._weights]
        self.encode.max_graphs = len(image_batch_sizes) or 1
        all_masks = list(decoder.all_masks.values()) if decoder else []
        for function in all_masks:
            function.max_graphs = 2 * len(prompt_counts) or 1  # points and boxes
        self.report = OptimizationReport(encoder=f"plain: {reason}" if reason else "fused")
        if captures:
            self._capture(in_order(graphs), steps)
        for function in (self.encode, *all_masks):
            function.freeze()
            self.report.num_graphs += len(function)
        if on_cuda and when_needed:
            for graph in graphs:
                graph.function.capture_when_called(*graph.make_inputs(torch.device("meta")))
            self.report.num_graphs_when_needed = len(graphs)
        self.report.warm_up_seconds = time.perf_counter() - start

    @contextlib.contextmanager
    def _compiled_at_the_same_time(self, config: PreTrainedConfig) -> Iterator[None]:
        """Compile the kernels of all that is made inside, and of all probes, in a round that ends with the block."""
        sides = config.output_channels, config.image_size // config.patch_size
        loading = threading.Thread(target=load_convolution, args=(self.device, self.dtype, *sides), daemon=True)
        loading.start()
        with compiling_ahead(), only_compiling():
            yield
        loading.join()

    def graphs(self, image_batch_sizes: Sequence[int], prompt_counts: Sequence[int]) -> list["PlannedGraph"]:
        """List the graphs for these numbers of images and prompts, or for the parts of larger ones."""
        planned, size, decoder = [], self.image_shape[-1], self.decoder
        batch_sizes = dict.fromkeys(part_size(batch_size, MOST_IMAGES) for batch_size in image_batch_sizes)
        counts = dict.fromkeys(part_size(count, MOST_PROMPTS) for count in prompt_counts)
        for batch_size in batch_sizes if self.encode.enabled else ():

            def images(device: torch.device, batch_size=batch_size) -> list[torch.Tensor]:
                return [torch.zeros(batch_size, *self.image_shape, device=device, dtype=self.dtype)]

            num_bytes = batch_size * self.features * self.dtype.itemsize
            planned.append(PlannedGraph(f"{batch_size} images", self.encode, images, num_bytes))
        for count in counts if decoder else ():
            assert decoder is not None
            tokens = decoder.positions

            def boxes(device: torch.device, count=count, tokens=tokens) -> list[torch.Tensor]:
                corners = torch.tensor([[0.0, 0.0, size / 2, size / 2]], dtype=torch.float32, device=device)
                return [torch.zeros_like(tokens, device=device)[None], corners.expand(count, -1).contiguous()]

            def points(device: torch.device, count=count, boxes=boxes) -> list[torch.Tensor]:
                image, corners = boxes(device)
                labels = torch.ones(count, 1, dtype=torch.int32, device=device)
                return [image, corners[:, None, 2:].contiguous(), labels]

            num_bytes = count * tokens.nbytes  # the image tokens of each prompt
            for multimask_output in (True, False):
                function = decoder.all_masks[multimask_output, False]
                masks = "three masks" if multimask_output else "one mask"
                logits = decoder.logits_bytes(multimask_output, count)
                planned.append(PlannedGraph(f"{count} points, {masks}", function, points, num_bytes, logits))
                planned.append(PlannedGraph(f"{count} boxes, {masks}", function, boxes, num_bytes, logits))
        return planned

    @torch.inference_mode()
    def _capture(self, graphs: Sequence["PlannedGraph"], steps: Iterator[str]):
        assert self.memory is not None
        meta = torch.device("meta")
        needed = (packed_bytes(graph.make_inputs(meta)) + graph.result_bytes for graph in graphs)
        self.memory.reserve(max(needed, default=0), self.device)
        for graph, _ in zip(graphs, steps, strict=True):
            graph.function(*graph.make_inputs(self.device))
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self.report.graph_memory_mb = self.memory.num_bytes() / 2**20

    def check_weights(self):
        """Raise RuntimeError if the model's own weights are no longer those that were copied."""
        if any(tensor._version != version for tensor, version in zip(self._weights, self._versions)):
            raise RuntimeError(
                "the weights of an optimized model have been changed: change the model itself, and optimize it again."
            )

    def warn_once(self, part: str, reason: str):
        """Warn that a part runs as in the model, once for each reason."""
        message = f"The {part} of this optimized model runs as in the model, and slower: {reason}"
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=5)

    def embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode pixel values (B, 3, S, S) to embeddings (B, C, h, w), which belong to the caller."""
        if self.copied is None:
            self.check_weights()
        parts = self._parts(self.encode, MOST_IMAGES, [], [pixel_values])
        with turn(self.device):
            if len(parts) == 1:
                return self.encode(pixel_values).clone()
            first = self.encode(pixel_values[parts[0]])
            embeddings = first.new_empty_strided((len(pixel_values), *first.shape[1:]), first.stride())
            embeddings[parts[0]] = first
            for part in parts[1:]:
                embeddings[part] = self.encode(pixel_values[part])
        return embeddings

    @staticmethod
    def _parts(
        function: GraphedFunction, most: int, common: list[torch.Tensor], divided: list[torch.Tensor]
    ) -> list[slice]:
        """Divide rows into parts for which there is a graph; if there is none they are computed all at once."""
        count = divided[0].shape[0]
        if count <= most:
            return [slice(0, count)]
        parts = parts_of(count, most)
        has_graph = function.replays(*common, *(tensor[parts[0]] for tensor in divided))
        return parts if has_graph else [slice(0, count)]

    def masks(
        self, embeddings: torch.Tensor, prompts: list[torch.Tensor], masks: torch.Tensor | None, multimask_output: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode prompts.

        Args:
            embeddings: (B, C, h, w).
            prompts: Points, labels and boxes, as far as there are any, each (B, P, ...).
            masks: Logits of earlier masks (B, 1, h, w), or None.
            multimask_output: Three masks for each prompt instead of one.

        Returns:
            Scores (B, P, M) and logits (B, P, M, 4h, 4w), which belong to the caller.
        """
        assert self.decoder is not None
        decode = self.decoder.all_masks[bool(multimask_output), masks is not None]
        images = embeddings.to(self.decoder.dtype).flatten(2).transpose(1, 2)  # (B, N, C)
        num_images, num_prompts = prompts[0].shape[:2]
        shape = num_images, num_prompts, self.decoder.num_masks(multimask_output)
        scores = torch.empty(shape, dtype=self.dtype, device=self.device)
        logits = torch.empty(*shape, *self.decoder.logits_size, dtype=self.dtype, device=self.device)
        for index in range(num_images):
            image, divided = images[index : index + 1], [prompt[index] for prompt in prompts]
            if masks is not None:
                divided.insert(0, masks[index].expand(num_prompts, -1, -1))
            for part in self._parts(decode, MOST_PROMPTS, [image], divided):
                with turn(self.device):
                    iou, computed = decode(image, *(tensor[part] for tensor in divided))
                    scores[index, part] = iou
                    logits[index, part] = computed.unflatten(0, iou.shape)
        return scores, logits


class _Optimized(_Module):
    """The base of an optimized model and of its encoder: device, dtype and weights of both are fixed."""

    _paths: FastPaths

    def _apply(self, fn, *args, **kwargs):
        probe = fn(next(self.parameters()).detach()[:0])  # before any weights are moved: the original may share them
        if (probe.device, probe.dtype) != (self._paths.device, self._paths.dtype):
            raise RuntimeError(
                f"an optimized model stays on {self._paths.device} in {self._paths.dtype}: move the model itself, and "
                "optimize it again."
            )
        return super()._apply(fn, *args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        raise ValueError("an optimized model is for inference alone: save the model that it was made from.")

    def __reduce_ex__(self, protocol):  # copy, deepcopy, pickle
        raise TypeError(
            "an optimized model holds CUDA graphs: copy or pickle the model that it was made from, and optimize that."
        )


class OptimizedEncoder(_Optimized):
    def plain_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the embeddings as the original model does."""
        return super().forward(pixel_values).last_hidden_state

    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> SamVisionEncoderOutput:
        reason = _why_not_keywords(self.config, kwargs) or self._why_not(pixel_values)
        if reason is None:
            assert pixel_values is not None
            if pixel_values.dtype != self._paths.dtype:
                pixel_values = pixel_values.to(self._paths.dtype)
            return SamVisionEncoderOutput(last_hidden_state=self._paths.embeddings(pixel_values))
        self._paths.check_weights()
        outputs = super().forward(pixel_values, **kwargs)  # which raises the right error for a wrong size, too
        self._paths.warn_once("image encoder", reason)
        return outputs

    def _why_not(self, pixel_values: torch.Tensor | None) -> str | None:
        if pixel_values is None or not pixel_values.is_floating_point():
            return "there are no pixel_values in floating point."
        if pixel_values.shape[1:] != self._paths.image_shape:
            return f"pixel_values are not (B, {', '.join(map(str, self._paths.image_shape))})."
        return "pixel_values require a gradient." if pixel_values.requires_grad else None


class OptimizedModel(_Optimized):
    @property
    def report(self) -> OptimizationReport:
        return self._paths.report

    def forward(
        self, pixel_values=None, input_points=None, input_labels=None, input_boxes=None, input_masks=None,
        image_embeddings=None, multimask_output: bool = True, **kwargs,
    ) -> SamImageSegmentationOutput:  # fmt: skip
        prompts = _prompts(input_points, input_labels, input_boxes)
        reason = self._why_not(pixel_values, image_embeddings, prompts, input_masks, kwargs)
        if reason is not None:
            self._paths.check_weights()
            outputs = super().forward(
                pixel_values=pixel_values, input_points=input_points, input_labels=input_labels,
                input_boxes=input_boxes, input_masks=input_masks, image_embeddings=image_embeddings,
                multimask_output=multimask_output, **kwargs,
            )  # fmt: skip
            if self._paths.decoder is not None:  # without one, `optimize` has warned already
                self._paths.warn_once("mask decoder", reason)
            return outputs
        if image_embeddings is None:
            image_embeddings = self.vision_encoder(pixel_values).last_hidden_state
        scores, logits = self._paths.masks(image_embeddings, prompts, input_masks, multimask_output)
        return SamImageSegmentationOutput(iou_scores=scores, pred_masks=logits)

    def _why_not(self, pixel_values, image_embeddings, prompts, masks, kwargs: dict) -> str | None:
        """Return why the mask decoder runs as in the model for this call, as a sentence, or None if it does not."""
        if self._paths.decoder is None:
            return self.report.decoder
        if reason := _why_not_keywords(self.config, kwargs):
            return reason
        if (pixel_values is None) == (image_embeddings is None):
            return "it needs either pixel_values or image_embeddings."
        if pixel_values is not None and (reason := _why_not_keywords(self.config.vision_config, {})):
            return reason
        image = pixel_values if image_embeddings is None else image_embeddings
        if not prompts or any(prompt.shape[:2] != (len(image), prompts[0].shape[1]) for prompt in prompts):
            return "there are not as many points (B, P, k, 2), labels (B, P, k) or boxes (B, P, 4) for each image."
        if masks is not None and masks.shape[:2] != (len(image), 1):
            return "input_masks are not (B, 1, h, w)."
        if any(tensor is not None and tensor.requires_grad for tensor in (image, masks, *prompts)):
            return "an input requires a gradient."
        return None


def _why_not_keywords(config: PreTrainedConfig, kwargs: dict) -> str | None:
    """Return why a call needs the model itself, as a sentence, or None.

    It does if it asks for more outputs or for a tuple, or has arguments that change the masks.
    SAM ignores any other keyword, such as `original_sizes` and `reshaped_input_sizes` of its processor.
    """
    for name, value in kwargs.items():
        asks = (
            value is not None
            if name in ("attention_similarity", "target_embedding")
            else name.startswith("output_") and value
        )
        if asks or (name == "return_dict" and value is False):
            return f"it is called with {name}."
    if _read(config, "output_hidden_states"):
        return "output_hidden_states is set in its config."
    if _read(config, "output_attentions"):
        return "output_attentions is set in its config."
    return None if _read(config, "return_dict") else "return_dict is not set in its config."


def _prompts(points, labels, boxes) -> list[torch.Tensor]:
    """Return the prompts that there are, in the decoder's order, or an empty list if the model itself must answer."""
    if points is None and labels is not None:
        return []
    prompts = []
    if points is not None:
        if points.ndim != 4 or (labels is not None and labels.shape != points.shape[:3]):
            return []
        # In the dtypes that the graphs were captured with. From the CPU this is one copy, and no kernel before it.
        if labels is None:
            labels = torch.ones(points.shape[:3], dtype=torch.int32, device="cpu")
        prompts += [points.float(), labels.to(torch.int32)]
    if boxes is not None:
        if boxes.ndim != 3:
            return []
        prompts.append(boxes.float())
    return prompts


@lru_cache
def optimized_class(optimized: type, cls: type) -> type:
    """Derive from `cls` and `OptimizedEncoder` or `OptimizedModel` a class of the same name."""
    return type(cls.__name__, (optimized, cls), {"__module__": cls.__module__, "optimized_from": cls})
