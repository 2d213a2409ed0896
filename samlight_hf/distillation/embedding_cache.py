"""A cache of the teacher's targets on disk, computed once for a fixed set of views."""

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..loading import computed_settings
from ..utils.atomic_files import atomic_write
from .teacher import Teacher, normalize_pixels


class CacheError(ValueError):
    """A cache of embeddings cannot be used; the message says what to do."""


class EmbeddingCache:
    """A teacher's targets for a fixed set of images, stored in float16 in safetensors shards.

    The files are `folder`/KEY/00000.safetensors and so on. Each has the targets of `SHARD_SIZE` examples by name, and a
    checksum for each example. KEY is a hash of the teacher's weights and config, its layers and the preprocessing:
    another teacher, other layers or another preprocessing use another folder, so wrong targets are never read.

    An image of 1024 px takes 2 MiB for the embedding, and 2 x 4096 x C bytes for each layer.

    Args:
        folder: the folder of all caches.
        teacher: the teacher whose targets are stored.
        num_examples: number of images, each a view with a number of its own.
        preprocessing: description of the transformations that the images went through.
    """

    SHARD_SIZE = 32

    def __init__(self, folder: str | Path, teacher: Teacher, num_examples: int, preprocessing: dict):
        self.names, self.num_examples = teacher.names, num_examples
        self.content = {
            "teacher": teacher.fingerprint,
            "config": computed_settings(teacher.config.to_dict()),
            "layers": list(teacher.layers),
            "dtype": str(teacher.dtype),
            "preprocessing": preprocessing,
        }
        text = json.dumps(self.content, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = Path(folder) / self.key

    @property
    def num_shards(self) -> int:
        return -(-self.num_examples // self.SHARD_SIZE)

    def missing_shards(self) -> list[int]:
        return [shard for shard in range(self.num_shards) if not self._path(shard).is_file()]

    def shard_ids(self, shard: int) -> range:
        return range(shard * self.SHARD_SIZE, min((shard + 1) * self.SHARD_SIZE, self.num_examples))

    def write(self, shard: int, targets: list[torch.Tensor], pixel_checksums: list[int]):
        """Write a shard with the targets of all its examples.

        Args:
            shard: number of the shard.
            targets: a tensor for each of `names`, the first dimension being the shard's examples.
            pixel_checksums: the `checksum` of each example's pixels.

        Raises:
            CacheError: for values that float16 cannot hold.
        """
        half = {
            name: tensor.to("cpu", torch.float16).contiguous() for name, tensor in zip(self.names, targets, strict=True)
        }
        for name, tensor in half.items():
            if not torch.isfinite(tensor).all():
                raise CacheError(f"the teacher's {name} has NaN or values beyond float16. Distil without a cache.")
        half["checksums"] = torch.tensor(
            [checksum([half[name][i] for name in self.names]) for i in range(len(targets[0]))]
        )
        half["pixel_checksums"] = torch.tensor(pixel_checksums)
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {"key": self.key, "content": json.dumps(self.content, sort_keys=True, default=str)}
        atomic_write(self._path(shard), lambda aside: save_file(half, aside, metadata))

    def read(self, example_id: int, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Read the targets of one example.

        Args:
            example_id: number of the example.
            pixel_values: uint8 (3, S, S), the pixels of the image, which may have been replaced under its name.

        Returns:
            float16 tensors in the order of `names`, without a batch axis.

        Raises:
            CacheError: for targets that are missing, damaged, or computed from other pixels.
        """
        shard, position = divmod(int(example_id), self.SHARD_SIZE)
        path = self._path(shard)
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    raise CacheError(f"{path}: written by another teacher or preprocessing. Delete it.")
                targets = [file.get_slice(name)[position] for name in self.names]
                names = ("checksums", "pixel_checksums")
                target_sum, pixel_sum = (int(file.get_slice(name)[position]) for name in names)
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"{path}: missing or damaged ({error}). Delete it, and run again to have it made."
            ) from error
        if checksum(targets) != target_sum:
            raise CacheError(
                f"{path}: example {example_id} is damaged. Delete the file, and run again to have it made."
            )
        if checksum([pixel_values]) != pixel_sum:
            raise CacheError(
                f"{path}: example {example_id} was made of another image. Delete {self.folder}, and run again."
            )
        return targets

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"


def checksum(tensors: Sequence[torch.Tensor]) -> int:
    """Return the CRC-32 of the bytes of tensors on the CPU."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, value)
    return value


def fill_cache(
    cache: EmbeddingCache, views: Dataset, teacher: Teacher, device: torch.device, batch_size: int, num_workers: int
):
    """Compute the shards that the cache lacks. Under accelerate each process computes its share of them.

    Shards are written completely or not at all, so after an interruption only the missing ones are computed.

    Args:
        cache: the cache to fill.
        views: the images; `views[example_id]` has "pixel_values" (3, S, S) and "reshaped_input_sizes" (2,).
        teacher: the teacher, moved to `device`.
        device: the device that it runs on.
        batch_size: images in one call of the teacher.
        num_workers: processes that load images.
    """
    state = PartialState()
    # Chosen by number, not from the missing ones that each process sees: other processes may already be writing.
    own_shards = range(state.process_index, cache.num_shards, state.num_processes)
    shards = sorted(set(cache.missing_shards()).intersection(own_shards))
    teacher.encoder.to(device)
    splits = [
        list(cache.shard_ids(shard)[i : i + batch_size])
        for shard in shards
        for i in range(0, cache.SHARD_SIZE, batch_size)
    ]
    batches = [batch for batch in splits if batch]
    loader = iter(DataLoader(views, batch_sampler=batches, num_workers=num_workers))
    disable = not state.is_main_process or not shards
    with tqdm(shards, desc="teacher's targets", unit="shard", disable=disable) as progress:
        for shard in progress:
            parts: list[list[torch.Tensor]] = []
            pixel_checksums: list[int] = []
            while len(pixel_checksums) < len(cache.shard_ids(shard)):
                batch = next(loader)
                pixel_checksums += [checksum([pixels]) for pixels in batch["pixel_values"]]
                pixel_values = normalize_pixels(
                    batch["pixel_values"].to(device), batch["reshaped_input_sizes"].to(device)
                )
                parts.append([target.to("cpu", torch.float16) for target in teacher.targets(pixel_values)])
            cache.write(shard, [torch.cat(targets) for targets in zip(*parts)], pixel_checksums)
    state.wait_for_everyone()


class CachedExamples(Dataset):
    """Examples with the cached "targets" of their view, a list of float16 tensors."""

    def __init__(self, examples: Dataset, cache: EmbeddingCache):
        self.examples, self.cache = examples, cache

    def __len__(self) -> int:
        return len(self.examples)  # type: ignore[arg-type]  # torch's Dataset declares no length

    def __getitem__(self, n: int) -> dict:
        example = self.examples[n]
        return {**example, "targets": self.cache.read(example["example_id"], example["pixel_values"])}
