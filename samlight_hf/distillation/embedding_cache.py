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

from ..files import write_aside
from .teacher import Teacher, normalize_pixels


class CacheError(ValueError):
    """A cache of embeddings that cannot be used; the message says what to do."""


class EmbeddingCache:
    """A teacher's targets of a fixed set of pictures, float16, in safetensors shards.

    `folder`/KEY/00000.safetensors, ..., each with the targets of `SHARD_SIZE` examples by name and a checksum for each
    example. KEY is made of the teacher's weights, its layers and what the pictures went through: another teacher, other layers
    or another preprocessing find another folder, and never wrong targets.

    A picture of 1024 px takes 2 MiB for the embedding, and 2 x 4096 x C bytes for each layer.
    """

    SHARD_SIZE = 32

    def __init__(self, folder: str | Path, teacher: Teacher, num_examples: int, preprocessing: dict):
        self.names, self.num_examples = teacher.names, num_examples
        self.content = {
            "teacher": teacher.fingerprint,
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

    def write(self, shard: int, targets: list[torch.Tensor]):
        """Writes a shard, aside first. `targets` are of all its examples, by `names`. Raises CacheError for values that float16 cannot hold."""
        half = {
            name: tensor.to("cpu", torch.float16).contiguous() for name, tensor in zip(self.names, targets, strict=True)
        }
        for name, tensor in half.items():
            if not torch.isfinite(tensor).all():
                raise CacheError(f"the teacher's {name} has NaN or values beyond float16. Distil without a cache.")
        half["checksums"] = torch.tensor(
            [self._checksum([half[name][i] for name in self.names]) for i in range(len(targets[0]))]
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {"key": self.key, "content": json.dumps(self.content, sort_keys=True, default=str)}
        write_aside(self._path(shard), lambda aside: save_file(half, aside, metadata))

    def read(self, example_id: int) -> list[torch.Tensor]:
        """The targets of one example, float16, without a batch axis. Raises CacheError for what is missing or damaged."""
        shard, position = divmod(int(example_id), self.SHARD_SIZE)
        path = self._path(shard)
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    raise CacheError(f"{path}: written by another teacher or preprocessing. Delete it.")
                targets = [file.get_slice(name)[position] for name in self.names]
                checksum = file.get_slice("checksums")[position]
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"{path}: missing or damaged ({error}). Delete it, and run again to have it made."
            ) from error
        if self._checksum(targets) != int(checksum):
            raise CacheError(
                f"{path}: example {example_id} is damaged. Delete the file, and run again to have it made."
            )
        return targets

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    @staticmethod
    def _checksum(tensors: Sequence[torch.Tensor]) -> int:
        checksum = 0
        for tensor in tensors:
            checksum = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), checksum)
        return checksum


def fill_cache(
    cache: EmbeddingCache, views: Dataset, teacher: Teacher, device: torch.device, batch_size: int, num_workers: int
):
    """Computes what the cache misses. `views[example_id]` has the pixels. Under accelerate each process takes its share of shards.

    Shards are written whole: after an interruption only those that are missing are computed.
    """
    state = PartialState()
    shards = cache.missing_shards()[state.process_index :: state.num_processes]
    teacher.encoder.to(device)
    batches = [
        cache.shard_ids(shard)[i : i + batch_size] for shard in shards for i in range(0, cache.SHARD_SIZE, batch_size)
    ]
    batches = [list(batch) for batch in batches if batch]
    loader = iter(DataLoader(views, batch_sampler=batches, num_workers=num_workers))
    for shard in tqdm(shards, desc="teacher's targets", unit="shard", disable=not state.is_main_process or not shards):
        parts = []
        while sum(len(targets[0]) for targets in parts) < len(cache.shard_ids(shard)):
            batch = next(loader)
            pixel_values = normalize_pixels(batch["pixel_values"].to(device), batch["reshaped_input_sizes"].to(device))
            parts.append([target.to("cpu", torch.float16) for target in teacher.targets(pixel_values)])
        cache.write(shard, [torch.cat(targets) for targets in zip(*parts)])
    state.wait_for_everyone()


class CachedExamples(Dataset):
    """Examples with the cached "targets" of their view, a list of float16 tensors."""

    def __init__(self, examples: Dataset, cache: EmbeddingCache):
        self.examples, self.cache = examples, cache

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, n: int) -> dict:
        example = self.examples[n]
        return {**example, "targets": self.cache.read(example["example_id"])}
