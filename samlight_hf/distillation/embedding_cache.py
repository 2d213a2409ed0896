"""A teacher's targets on disk: computed once for a fixed set of views, read by the workers that make the examples."""

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

from ..utils.atomic_files import atomic_write
from .teacher import Teacher, normalize_pixels


class CacheError(ValueError):
    """A cache of embeddings that cannot be used; the message says what to do."""


class EmbeddingCache:
    """A teacher's targets of a fixed set of images, float16, in safetensors shards.

    `folder`/KEY/00000.safetensors, ..., each with the targets of `SHARD_SIZE` examples by name and a checksum for each
    example. KEY is made of the teacher's weights, its layers and what the images went through: another teacher, other layers
    or another preprocessing find another folder, and never wrong targets.

    An image of 1024 px takes 2 MiB for the embedding, and 2 x 4096 x C bytes for each layer.
    """

    SHARD_SIZE = 32

    def __init__(self, folder: str | Path, teacher: Teacher, num_examples: int, preprocessing: dict):
        self.names, self.num_examples = teacher.names, num_examples
        self.content = {
            "teacher": teacher.fingerprint,
            "config": teacher.config.to_dict(),  # windows, patterns and epsilons are in no weight
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
        """Writes a shard, aside first. `targets` are of all its examples, by `names`, and so are the `checksum`s of their pixels.

        Raises CacheError for values that float16 cannot hold.
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
        """The targets of one example, float16, without a batch axis.

        Raises CacheError for what is missing or damaged, and for targets of other pixels than `pixel_values`, uint8 (3, S, S):
        an image may have been replaced under its name.
        """
        shard, position = divmod(int(example_id), self.SHARD_SIZE)
        path = self._path(shard)
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    raise CacheError(f"{path}: written by another teacher or preprocessing. Delete it.")
                targets = [file.get_slice(name)[position] for name in self.names]
                of_targets, of_pixels = (
                    int(file.get_slice(name)[position]) for name in ("checksums", "pixel_checksums")
                )
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"{path}: missing or damaged ({error}). Delete it, and run again to have it made."
            ) from error
        if checksum(targets) != of_targets:
            raise CacheError(
                f"{path}: example {example_id} is damaged. Delete the file, and run again to have it made."
            )
        if checksum([pixel_values]) != of_pixels:
            raise CacheError(
                f"{path}: example {example_id} was made of another image. Delete {self.folder}, and run again."
            )
        return targets

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"


def checksum(tensors: Sequence[torch.Tensor]) -> int:
    """CRC-32 of the bytes of tensors on the CPU."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), value)
    return value


def fill_cache(
    cache: EmbeddingCache, views: Dataset, teacher: Teacher, device: torch.device, batch_size: int, num_workers: int
):
    """Computes what the cache misses. `views[example_id]` has the pixels. Under accelerate each process takes its share of shards.

    Shards are written whole: after an interruption only those that are missing are computed.
    """
    state = PartialState()
    # By their numbers, not by what each process finds missing: the others may already be writing.
    mine = range(state.process_index, cache.num_shards, state.num_processes)
    shards = sorted(set(cache.missing_shards()).intersection(mine))
    teacher.encoder.to(device)
    batches = [
        cache.shard_ids(shard)[i : i + batch_size] for shard in shards for i in range(0, cache.SHARD_SIZE, batch_size)
    ]
    batches = [list(batch) for batch in batches if batch]
    loader = iter(DataLoader(views, batch_sampler=batches, num_workers=num_workers))
    disable = not state.is_main_process or not shards
    with tqdm(shards, desc="teacher's targets", unit="shard", disable=disable) as progress:
        for shard in progress:
            parts, pixel_checksums = [], []
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
        return len(self.examples)

    def __getitem__(self, n: int) -> dict:
        example = self.examples[n]
        return {**example, "targets": self.cache.read(example["example_id"], example["pixel_values"])}
