"""SAM's mask decoder in fewer operations, with the same results up to rounding.

The cost of the decoder is on the image side: N = 4096 image tokens of 256 channels for every prompt. It is reduced as
follows:

- In the first layer all prompts of an image see the same image tokens, whose keys, values and queries are projected
  once.
- In later layers prompt tokens are few (T = 7) and image tokens many. A projection W of the image tokens x that only
  meets prompt tokens is moved to their side: q (W x)^T = (q W) x^T, and p (x W) = (p x) W, where p are the attention
  probabilities of T tokens. So no projection of an image token is computed, written or read.
- All tensors stay in the layout (prompts, tokens, channels). Transposed convolutions of stride 2 are matrix products,
  and only the finished masks are put into pixel order.
- If the caller gives a minimum for the predicted IoU, masks below it are not computed.
- In half precision Triton kernels (`kernels.image_attention`, `kernels.shared_attention`, `kernels.mask_head`) compute
  the rest of the image side, and with few prompts the side of the prompt tokens, too (`kernels.tokens`).

Three small parts are computed in float32 whatever the model's dtype: the positions of prompts and image tokens (in
bfloat16 a coordinate in an image of 1024 pixels is off by up to a pixel), the predicted IoU (one score in a hundred
would equal another one bit by bit, and the order of masks would decide which of two is suppressed) and the
hypernetworks.
"""

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

from ..kernels import cpu_blocks, image_attention, mask_head, shared_attention
from ..kernels import tokens as token_kernels
from ..kernels.prompt_embedding import PromptEmbedding
from ..kernels.support import compile_ahead, is_out_of_memory, only_compiles, settled
from ..kernels.tokens import TokenKernels, stack_layers
from ..utils.autocast import without_autocast
from ..utils.host_copies import HostCopy
from ..utils.turns import takes_turns, turn
from .cuda_graphs import GraphedFunction, GraphMemory
from .decoded import Decoded, KeptMasks, decoded_at_once, places_above, slots_above
from .plain_modules import same_bits, weights_of, why_not_plain_decoder
from .two_way import run_two_way


# Numbers of prompts that have graphs: batches are filled up to the next one.
_PROMPT_COUNTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, token_kernels.MOST_PROMPTS)
_MOST_GRAPHS = 32  # of one kind; they share the memory for inputs, logits and what lies between


def why_not_fast(model: PreTrainedModel) -> str | None:
    """Return why `FastMaskDecoder` cannot run this model, as a sentence, or None if it can."""
    decoder, prompt_encoder = getattr(model, "mask_decoder", None), getattr(model, "prompt_encoder", None)
    if type(decoder) is not SamMaskDecoder or type(prompt_encoder) is not SamPromptEncoder:
        return f"{type(model).__name__} has no mask decoder of SAM's own architecture."
    return why_not_plain_decoder(model)


class FastMaskDecoder:
    """A copy of the prompt encoder and mask decoder of a `SamModel` or `SamLighteningModel`, for inference.

    The weights are copied: later changes of the model have no effect. Threads may share a decoder: `decode` takes
    turns.

    Args:
        model: The model.
        cuda_graphs: Replay the decoder from CUDA graphs, which needs a CUDA device.
        triton_kernels: Use Triton kernels. Default: where they run. The kernels for the tokens of few prompts are tried
            when such prompts come, and are never an error.
        dtype: The floating point type that the decoder computes in. Default: the model's.
        checked: The caller knows that `why_not_fast` returns None for the model.

    Attributes:
        is_lean: For a prompt with one point nothing but tokens and masks is ever in memory; see `MemoryBudget`.
        why_not_triton: For each group of kernels a sentence saying why it does not run, or None.

    Raises:
        ValueError: If the model has another decoder, see `why_not_fast`, or if `triton_kernels` is True, the decoder
            computes in half precision, and kernels cannot run.
    """

    @without_autocast
    def __init__(
        self,
        model: PreTrainedModel,
        cuda_graphs: bool = False,
        triton_kernels: bool | None = None,
        dtype: torch.dtype | None = None,
        checked: bool = False,
    ):
        if not checked and (reason := why_not_fast(model)):
            raise ValueError(reason)
        self.dtype, self.device = dtype or model.dtype, model.device
        self.image_embedding, self.prompt_encoder, self.decoder = (
            copy.deepcopy(part).to(self.dtype)
            for part in (model.shared_image_embedding, model.prompt_encoder, model.mask_decoder)
        )
        self.cuda_graphs = cuda_graphs
        self.graph_memory = GraphMemory() if cuda_graphs else None
        # The image tokens that a graph returns stay in memory, some hundred MB for each graph: so no more than two.
        self.transform = GraphedFunction(self._transform, cuda_graphs, 2, self.graph_memory, has_kernels=True)
        self.ahead = GraphedFunction(self._ahead, cuda_graphs, 2, self.graph_memory, has_kernels=True)
        self.all_masks = {
            (multimask, with_mask): GraphedFunction(
                partial(self._graphed_masks, multimask, with_mask),
                cuda_graphs,
                _MOST_GRAPHS,
                self.graph_memory,
                has_kernels=True,
            )
            for multimask in (False, True)
            for with_mask in (False, True)
        }
        self._seen_batches: set[tuple] = set()
        self._too_large: set[tuple] = set()  # batches for whose graph there was no memory
        decoder = self.decoder
        with torch.no_grad():
            self.positions = _image_positions(model).to(self.device, self.dtype)  # (N, C)
            self.no_mask = self.prompt_encoder.no_mask_embed.weight  # (1, C)
            self.output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).float()
            # In the model's dtype, which may have more bits.
            self.embed = PromptEmbedding(copy.deepcopy(model.prompt_encoder))
            first, second = _as_linear(decoder.upscale_conv1), _as_linear(decoder.upscale_conv2)
            self.head = mask_head.HeadWeights(*first, decoder.upscale_layer_norm, *second)
            self.hypernetworks, self.iou_head = (
                [(weight.float(), bias.float()) for weight, bias in stack_layers(mlps)]
                for mlps in (decoder.output_hypernetworks_mlps, [decoder.iou_prediction_head])
            )
        self.grid_size = tuple(self.prompt_encoder.image_embedding_size)
        self.logits_size = tuple(4 * side for side in self.grid_size)
        self.num_heads = model.config.mask_decoder_config.num_attention_heads
        self.triton_kernels = triton_kernels
        with turn(self.device):  # the weights have just been launched: another stream waits for them
            pass
        if not only_compiles():
            self.try_kernels()

    def try_kernels(self):
        """Find out which kernels run, all of them compiled at the same time; see `__init__` for what is raised.

        This is the end of `__init__`, but not within `only_compiling`.
        """
        compile_ahead(lambda: self.why_not_triton)
        reasons = [reason for reason in self.why_not_triton.values() if reason]
        if self.triton_kernels and reasons and self.dtype != torch.float32:
            raise ValueError(f"triton_kernels=True is not possible: {reasons[0]}")

    @settled
    def why_not_triton(self) -> dict[str, str | None]:
        kind = self.device, self.dtype, self.positions.shape[1], self.num_heads
        return {
            "attention": image_attention.why_not_triton(*kind)
            or shared_attention.why_not_triton(*kind, self._features),
            "head": mask_head.why_not_triton(self.head),
        }

    @property
    def _features(self) -> int:
        """Return the number of features of all heads' keys of image tokens together."""
        return self.decoder.config.hidden_size // self.decoder.config.attention_downsample_rate

    @settled
    def use_attention_kernels(self) -> bool:
        return self.why_not_triton["attention"] is None and self.triton_kernels is not False

    @settled
    def use_head_kernel(self) -> bool:
        return self.why_not_triton["head"] is None and self.triton_kernels is not False

    @settled
    def is_lean(self) -> bool:
        fits = image_attention.fits(self.num_heads, len(self.output_tokens) + 2)
        fits = fits and shared_attention.fits(self.num_heads, self._features)
        return self.use_head_kernel and self.use_attention_kernels and fits

    def is_copy_of(self, model: PreTrainedModel) -> bool:
        """Return whether a copy of the model made now would compute the same."""
        copies = {
            "shared_image_embedding": self.image_embedding,
            "prompt_encoder": self.prompt_encoder,
            "mask_decoder": self.decoder,
        }
        if why_not_plain_decoder(model, copies) is not None:
            return False
        own = weights_of(*(getattr(model, name) for name in copies))
        return same_bits([tensor.to(self.dtype) for tensor in own], weights_of(*copies.values()))

    def prepare(self, embedding: torch.Tensor) -> torch.Tensor:
        """Copy image embeddings (B, C, h, w) of the encoder to image tokens (B, N, C), which `decode` takes."""
        tokens = embedding.flatten(2).transpose(1, 2)
        return tokens.to(self.dtype, memory_format=torch.contiguous_format, copy=True)

    @without_autocast
    def decode(
        self,
        embedding: torch.Tensor,
        points: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        mask_logits: torch.Tensor | None = None,
        multimask_output: bool = True,
        min_iou: float | None = None,
        prompts_per_upscaling: int | None = None,
        repeated: bool = False,
        visible: tuple[int, int] | None = None,
        num_used: int | None = None,
    ) -> Decoded:
        """Decode P prompts, which are in pixels of the resized image, as `SamProcessor` makes them.

        A prompt has points, a box or both, and may have the logits of an earlier mask; these alone are a prompt, too.
        Prompts may be on the CPU.

        Args:
            embedding: Image tokens from `prepare`: (1, N, C) if all prompts are of one image, or (P, N, C).
            points: (P, k, 2), x and y.
            labels: (P, k): 1 on the object, 0 beside it.
            boxes: (P, 4), XYXY.
            mask_logits: (P, h, w).
            multimask_output: Three masks for each prompt instead of one.
            min_iou: Masks with a predicted IoU that is not above it are not computed.
            prompts_per_upscaling: The number of prompts whose masks are upscaled at once, the step that needs most
                memory.
            repeated: Batches of this shape come again and again, so that capturing a CUDA graph pays off.
            visible: The number of rows and columns of the logits that will be read; others need not be computed.
            num_used: The number of `repeated` prompts whose masks are returned; those behind them only fill a batch up.

        Returns:
            The masks; logits are (4 * h, 4 * w) for embeddings of h x w.

        Raises:
            ValueError: If there is no prompt, or if there are neither one nor P image embeddings.
        """
        prompts = [tensor for tensor in (points, labels, boxes) if tensor is not None]
        if not prompts and mask_logits is None:
            raise ValueError("there is no prompt: give points, boxes or mask_logits.")
        num_prompts = (prompts[0] if mask_logits is None else mask_logits).shape[0]
        if embedding.shape[0] not in (1, num_prompts):
            raise ValueError(f"{len(embedding)} images for {num_prompts} prompts: give one image, or one for each.")
        with turn(self.device) as is_captured:
            # Another decoder may have prepared it.
            image_tokens = embedding if embedding.dtype == self.dtype else embedding.to(self.dtype)
            if num_prompts and min_iou is None:
                inputs = [image_tokens, *prompts] if mask_logits is None else [image_tokens, mask_logits, *prompts]
                kind = multimask_output, mask_logits is not None
                if repeated and num_prompts == 1:
                    return _for_caller(self.all_masks[kind](*inputs), 1)
                if not repeated and self._decodes_in_few_kernels(prompts):
                    return self._decode_few(kind, inputs, num_prompts, is_captured)
            return self._decode(
                image_tokens, prompts, mask_logits, multimask_output, min_iou, prompts_per_upscaling, repeated, visible,
                num_used,
            )  # fmt: skip

    @torch.inference_mode()
    def _decode(
        self, image_tokens, prompts, mask_logits, multimask_output, min_iou, at_once, repeated, visible, num_used
    ) -> Decoded:
        """Decode prompts of any number, see `decode`."""
        if not (prompts[0] if mask_logits is None else mask_logits).shape[0]:
            nothing = torch.zeros(0, self.num_masks(multimask_output), dtype=torch.float32, device=self.device)
            return Decoded(nothing, None, nothing.new_zeros(0, *self.logits_size))
        prompts = [prompt.to(image_tokens.device, non_blocking=True) for prompt in prompts]
        transform = self.transform if repeated else self._transform
        tokens, image_tokens, iou, hyper = transform(image_tokens + self._dense(mask_logits), *prompts)
        tokens, image_tokens, iou = tokens[:num_used], image_tokens[:num_used], iou[:num_used]
        masks = _mask_slice(multimask_output)
        iou = iou[:, masks].float().clone()  # the next replay overwrites what a graph returned
        if hyper is not None:
            # All but the kernel itself is launched before the device is waited for.
            slots, hyper = slots_above(iou, min_iou), hyper[:num_used, masks].contiguous()
            kept = places_above(iou, min_iou)
            return Decoded(
                iou, kept, mask_head.masks_of(image_tokens, hyper, slots, len(kept), self.grid_size, self.head)
            )
        kept = places_above(iou, min_iou)
        logits = self._masks(tokens[:, 1:][:, masks], image_tokens, iou.shape, kept, masks, at_once, visible)
        return Decoded(iou, kept, logits)

    @takes_turns
    @without_autocast
    @torch.inference_mode()
    def decode_ahead(
        self,
        embedding: torch.Tensor,
        prompts: torch.Tensor,
        num_used: int,
        min_iou: float | None = None,
        meanwhile: Callable[[], None] | None = None,
        **options,
    ) -> Callable[[], KeptMasks]:
        """Launch `decode` for points on one image, with three masks each, in batches that come again and again.

        With the kernel of the decoder's end nothing waits for the device: the logits get room for all masks. Else the
        masks are computed here.

        Args:
            embedding: As in `decode`.
            prompts: float32 (P, 3 + E), on the embedding's device: x and y as in `decode`, `min_iou`, or infinity for
                prompts that are not used, and E numbers that are returned with each mask.
            num_used: The number of prompts whose masks are wanted; those behind them only fill the batch up.
            min_iou: As in `decode`.
            meanwhile: Called when all but the logits is launched, so that it takes no time of the device. What it
                launches comes before the logits.
            **options: As in `decode`.

        Returns:
            A function that waits until it is known which masks are computed, and returns them. They may not be finished
            then, but what is launched afterwards on the same stream can read them.
        """
        if not self.use_head_kernel:
            return decoded_at_once(self, embedding, prompts, num_used, meanwhile, min_iou=min_iou, **options)
        image_tokens, hyper, slots, table, state = self.ahead(embedding.to(self.dtype), prompts)
        # The next replay overwrites what a graph returned.
        state, table = HostCopy(state), table.clone()
        if meanwhile is not None:
            meanwhile()
        logits = mask_head.masks_of(image_tokens, hyper, slots, slots.numel(), self.grid_size, self.head)

        def wait() -> KeptMasks:
            num_kept, num_nan = state.wait()[0].tolist()
            return KeptMasks(table[:num_kept], logits[:num_kept], not num_nan)

        return wait

    def _ahead(self, image_tokens: torch.Tensor, prompts: torch.Tensor):
        """Compute all of `decode_ahead` but the logits.

        Returns:
            Image tokens (P, N, C), outputs of the hypernetworks (P, M, C / 8), slots (P, M) of `slots_above`, the table
            of `KeptMasks` for the masks that are kept, and behind them for others, and the number of the kept masks and
            of scores that are NaN.
        """
        masks, labels = _mask_slice(True), torch.ones(len(prompts), 1, dtype=torch.int64, device=prompts.device)
        _, image_tokens, iou, hyper = self._transform(image_tokens + self._dense(None), prompts[:, None, :2], labels)
        iou = iou[:, masks].float().contiguous()
        slots = slots_above(iou, prompts[:, 2:3])
        kept = slots.flatten() >= 0
        places = kept.nonzero_static(size=kept.numel(), fill_value=0).squeeze(1)
        table = torch.cat([iou.flatten()[places, None], prompts[places // iou.shape[1], 3:]], dim=1)
        state = torch.stack([kept.sum(dtype=torch.int32), iou.isnan().sum(dtype=torch.int32)])
        return image_tokens, hyper[:, masks].contiguous(), slots, table, state

    def _decodes_in_few_kernels(self, prompts: Sequence[torch.Tensor]) -> bool:
        return self.use_head_kernel and self._have_token_kernels_for(prompts)

    def _decode_few(
        self, kind: tuple[bool, bool], inputs: list[torch.Tensor], num_prompts: int, is_captured: bool
    ) -> Decoded:
        """Decode few prompts: launching their kernels takes longer than running them.

        Batches on one image are filled up to a size of `_PROMPT_COUNTS`. From the second batch of a size and kind on,
        they are replayed from a CUDA graph, if there is room and memory for one. Others run the same kernels for the
        same shapes, so that the results do not depend on it.
        """
        if self.cuda_graphs and inputs[0].shape[0] == 1 and not is_captured:
            size = graph_size(num_prompts)
            if size > num_prompts:
                inputs = [inputs[0], *(_filled_up(tensor, size) for tensor in inputs[1:])]
            replayed = self.all_masks[kind].replay(*inputs) or self._replay_first(kind, inputs)
            if replayed is not None:
                return _for_caller(replayed, num_prompts)
        with torch.inference_mode():
            is_filled_up = len(inputs[-1]) > num_prompts
            iou, logits = self._all_masks(*kind, *(tensor.to(inputs[0].device, non_blocking=True) for tensor in inputs))
            if is_filled_up:  # without the memory of the rest
                iou, logits = iou[:num_prompts].clone(), logits[: num_prompts * iou.shape[1]].clone()
            return Decoded(iou, None, logits)

    def _replay_first(self, kind: tuple[bool, bool], inputs: list[torch.Tensor]):
        """Capture a graph for a batch and return its outputs; None for the first batch of a kind, and without room."""
        batch = *kind, *((tensor.shape, tensor.dtype) for tensor in inputs)
        function, is_first = self.all_masks[kind], batch not in self._seen_batches
        self._seen_batches.add(batch)
        if is_first or batch in self._too_large or not function.has_room_for(*inputs):
            return None
        try:
            return function(*inputs)
        except Exception as error:  # while a graph was captured; the end of a capture may hide why it failed
            if not any(is_out_of_memory(cause) for cause in (error, error.__context__) if cause is not None):
                raise
            self._too_large.add(batch)
            return None

    def num_masks(self, multimask_output: bool) -> int:
        return len(self.output_tokens[1:][_mask_slice(multimask_output)])

    def _dense(self, mask_logits: torch.Tensor | None) -> torch.Tensor:
        """Embed earlier masks (P, h, w), or their absence: (P, N, C) or (1, C), to be added to the image tokens."""
        if mask_logits is None:
            return self.no_mask
        dense = self.prompt_encoder.mask_embed(mask_logits[:, None].to(self.no_mask.dtype))
        return dense.flatten(2).transpose(1, 2)

    def logits_bytes(self, multimask_output: bool, num_prompts: int) -> int:
        """Return the size of the logits that a graph computes."""
        return 4 * num_prompts * self.num_masks(multimask_output) * math.prod(self.logits_size)

    def _graphed_masks(self, multimask_output: bool, with_mask: bool, *inputs: torch.Tensor):
        """Compute `_all_masks`; in graphs with the logits, their largest result, in memory that all of them share."""
        out = None
        if self.graph_memory is not None and self.use_head_kernel:
            num_prompts, num_masks = len(inputs[-1]), self.num_masks(multimask_output)
            # For more than one prompt at once as large as for the most, so that graphs of other sizes share it.
            most = self.logits_bytes(True, token_kernels.MOST_PROMPTS) if num_prompts > 1 else 0
            memory = self.graph_memory.result(self.logits_bytes(multimask_output, num_prompts), inputs[0].device, most)
            if memory is not None:
                out = memory.view(torch.float32).view(num_prompts * num_masks, *self.logits_size)
        return self._all_masks(multimask_output, with_mask, *inputs, out=out)

    def _all_masks(
        self,
        multimask_output: bool,
        with_mask: bool,
        image_tokens: torch.Tensor,
        *prompts: torch.Tensor,
        out: torch.Tensor | None = None,
    ):
        """Compute the predicted IoU (P, M) and the logits (P * M, 4h, 4w) of all masks, without waiting for the device.

        `prompts` are the mask logits first, if `with_mask`, then points, labels and boxes, as far as there are any.
        With kernels the logits are written to `out`, if it is given.
        """
        masks = _mask_slice(multimask_output)
        image_tokens, prompts = image_tokens + self._dense(prompts[0] if with_mask else None), prompts[with_mask:]
        if self._have_token_kernels_for(prompts):
            assert self.token_kernels is not None
            iou, hyper, image_tokens = self.token_kernels(image_tokens, prompts, masks)
        else:
            tokens, image_tokens, iou, hyper = self._transform(image_tokens, *prompts)
            iou = iou[:, masks].float()
            hyper = self._hyper(tokens[:, 1:][:, masks], masks) if hyper is None else hyper[:, masks]
        if self.use_head_kernel:
            slots = slots_above(iou, None)
            logits = mask_head.masks_of(image_tokens, hyper, slots, iou.numel(), self.grid_size, self.head, out)
        else:
            logits = self._upscale(image_tokens, hyper).flatten(0, 1)
        return iou, logits

    @settled
    def token_kernels(self) -> TokenKernels | None:
        """The kernels for the tokens of few prompts, or None where they do not run; made when first needed."""
        if not self.use_attention_kernels:
            return None
        reason = token_kernels.why_not_triton(self.decoder, self.positions.device, self.dtype)
        self.why_not_triton["tokens"] = reason
        return None if reason else self._token_kernels

    @cached_property
    def _token_kernels(self) -> TokenKernels:
        return TokenKernels(self.decoder, self.embed, self.positions)

    def _have_token_kernels_for(self, prompts: Sequence[torch.Tensor]) -> bool:
        return (
            bool(prompts)
            and token_kernels.fits(self.num_heads, self.output_tokens.shape[0], prompts)
            and self.token_kernels is not None
        )

    def _transform(self, image_tokens: torch.Tensor, *prompts: torch.Tensor):
        """Embed the prompts and run the two-way transformer.

        Args:
            image_tokens: (1, N, C) or (P, N, C), with the embedding of a mask, or of its absence, added.
            *prompts: Points, labels and boxes, as far as there are any; none for prompts that are a mask alone.

        Returns:
            Output tokens (P, 1 + masks, C), image tokens (P, N, C) and predicted IoU (P, masks), of all the decoder's
            masks; and for the kernel of the decoder's end the outputs of their hypernetworks (P, masks, C / 8), else
            None.
        """
        output_tokens = self.output_tokens.expand(len(prompts[0] if prompts else image_tokens), -1, -1)
        prompt_tokens = self.embed(*prompts) if prompts else []
        embedded = torch.cat([output_tokens, *prompt_tokens], dim=1).to(image_tokens.dtype)
        tokens, image_tokens = run_two_way(
            self.decoder.transformer, embedded, image_tokens, self.positions, self.use_attention_kernels
        )
        iou = _run_mlps(self.iou_head, tokens[None, :, 0].float())[0]
        tokens = tokens[:, : len(self.output_tokens)]
        hyper = self._hyper(tokens[:, 1:], slice(None)) if self.use_head_kernel else None
        return tokens, image_tokens, iou, hyper

    def _masks(
        self, tokens, image_tokens, shape, kept, masks: slice, prompts_at_once: int | None, visible=None
    ) -> torch.Tensor:
        """Compute the logits (K, 4h, 4w) of the masks `kept` (K,), flat indices into `shape` (P, M), in steps."""
        num_masks = shape[1]
        if len(kept) == shape.numel():
            prompts, tokens_kept = None, tokens
        else:
            prompts, places = torch.unique_consecutive(kept // num_masks, return_inverse=True)
            tokens_kept = tokens[prompts]
            kept = places * num_masks + kept % num_masks
        hyper = self._hyper(tokens_kept, masks)  # (P', M, C / 8)
        if cpu_blocks.why_not(image_tokens) is None:  # one prompt after another, without copies of their image tokens
            chosen = range(len(hyper)) if prompts is None else prompts.tolist()
            logits = self._upscale(image_tokens, hyper, chosen, visible).flatten(0, 1)
            return logits if prompts is None else logits[kept]
        logits = tokens.new_empty(len(tokens_kept), num_masks, *self.logits_size)
        for start in range(0, len(hyper), prompts_at_once or len(hyper) or 1):
            part = slice(start, start + (prompts_at_once or len(hyper)))
            image_part = image_tokens[part] if prompts is None else image_tokens[prompts[part]]
            logits[part] = self._upscale(image_part, hyper[part])
        logits = logits.flatten(0, 1)
        return logits if prompts is None else logits[kept]

    def _hyper(self, tokens: torch.Tensor, masks: slice) -> torch.Tensor:
        """Run the hypernetworks, one MLP for each mask token, together: (P, M, C) -> (P, M, C / 8)."""
        layers = [(weight[masks], bias[masks]) for weight, bias in self.hypernetworks]
        return _run_mlps(layers, tokens.transpose(0, 1).float()).transpose(0, 1)

    def _upscale(
        self,
        image_tokens: torch.Tensor,
        hyper: torch.Tensor,
        prompts: Sequence[int] | None = None,
        visible: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Upscale image tokens (P, N, C) and multiply them with (P, M, C / 8): logits (P, M, 4h, 4w).

        On a CPU `hyper` may be that of some `prompts`, and `visible` is that of `decode`.
        """
        if cpu_blocks.why_not(image_tokens) is None:
            chosen = range(len(hyper)) if prompts is None else prompts
            return cpu_blocks.run_head(image_tokens, chosen, hyper, self.grid_size, self.head, visible)
        return mask_head.run_head(image_tokens, hyper, self.grid_size, self.head)


@torch.inference_mode()  # entered behind a replay, which needs none: it takes longer than to launch a copy
def _for_caller(outputs: tuple[torch.Tensor, torch.Tensor], num_prompts: int) -> Decoded:
    """Copy what a graph of `_all_masks` returned for the first `num_prompts`: the next replay overwrites it."""
    iou, logits = outputs
    if num_prompts < iou.shape[0]:
        iou, logits = iou[:num_prompts], logits[: num_prompts * iou.shape[1]]
    return Decoded(iou.clone(), None, logits.to(torch.float32, copy=True))


def graph_size(num_prompts: int) -> int:
    """Return the number of prompts that a batch of at most `MOST_PROMPTS` is filled up to, to find a graph."""
    return _PROMPT_COUNTS[bisect_left(_PROMPT_COUNTS, num_prompts)]


def largest_batch(most: int) -> int:
    """Return the largest number of prompts that is filled up to no more than `most`."""
    return most if most >= token_kernels.MOST_PROMPTS else max(count for count in _PROMPT_COUNTS if count <= most)


def _filled_up(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat the last row of a tensor until it has `count` rows."""
    return torch.cat([tensor, tensor[-1:].expand(count - len(tensor), *tensor.shape[1:])])


def _mask_slice(multimask_output: bool) -> slice:
    return slice(1, None) if multimask_output else slice(0, 1)


def _image_positions(model: PreTrainedModel) -> torch.Tensor:
    """Compute the positional encoding of the image tokens, float32 (N, C).

    It is computed on the CPU: a product on a GPU would have to load cuBLAS, which nothing else in `optimize` may need.
    """
    embedding, size = model.shared_image_embedding, model.config.prompt_encoder_config.image_embedding_size
    line = (torch.arange(size, dtype=torch.float32, device="cpu") + 0.5) / size
    y, x = torch.meshgrid(line, line, indexing="ij")
    positions = copy.deepcopy(embedding).float().cpu()(torch.stack([x, y], dim=-1)[None])
    return positions.flatten(0, 2)


def _as_linear(convolution: nn.ConvTranspose2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight (2 * 2 * out, in) and bias of a transposed convolution whose kernel and stride are 2 x 2."""
    assert convolution.kernel_size == convolution.stride == (2, 2) and convolution.bias is not None
    weight = convolution.weight.permute(2, 3, 1, 0)  # (in, out, 2, 2) -> (2, 2, out, in)
    return weight.reshape(-1, weight.shape[-1]).contiguous(), convolution.bias.repeat(4)


def _run_mlps(layers: list[tuple[torch.Tensor, torch.Tensor]], hidden: torch.Tensor) -> torch.Tensor:
    """Run M MLPs of `stack_layers`, with ReLU between layers, each on its own part of (M, P, in): (M, P, out)."""
    for index, (weight, bias) in enumerate(layers):
        hidden = torch.baddbmm(bias, hidden if index == 0 else hidden.relu(), weight)
    return hidden
