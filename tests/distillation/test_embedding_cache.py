import pytest
import torch
import transformers

from samlight_hf.distillation import CachedExamples, CacheError, EmbeddingCache, Teacher, fill_cache
from samlight_hf.distillation.teacher import normalize_pixels
from tests.launcher import torchrun

from .conftest import make_examples, make_teacher


def make_cache(folder, examples, seed=0, layers=(2, 4)):
    teacher = Teacher(make_teacher(seed), layers, torch.float32)
    return EmbeddingCache(folder, teacher, examples.num_ids, examples.preprocessing()), teacher


def fill(cache, examples, teacher):
    fill_cache(cache, examples.views(), teacher, torch.device("cpu"), batch_size=6, num_workers=0)


@pytest.fixture
def examples():
    return make_examples(50, with_prompts=False, num_views=2)  # 20 images, 40 views: two shards


@pytest.fixture
def filled(tmp_path, examples):
    cache, teacher = make_cache(tmp_path, examples)
    fill(cache, examples, teacher)
    return cache, teacher


def test_cached_targets_are_the_teachers(filled, examples):
    cache, teacher = filled
    assert cache.num_shards == 2
    assert not cache.missing_shards()
    cached = CachedExamples(examples, cache)
    assert len(cached) == 50
    for n in (0, 7, 33, 49):
        example = cached[n]
        pixels = normalize_pixels(example["pixel_values"][None], example["reshaped_input_sizes"][None])
        for mine, theirs in zip(example["targets"], teacher.targets(pixels), strict=True):
            assert mine.dtype == torch.float16
            torch.testing.assert_close(mine.float(), theirs[0], atol=4e-3, rtol=2e-3)


def test_only_what_is_missing_is_computed(filled, examples):
    cache, teacher = filled
    first, second = sorted(cache.folder.iterdir())
    second.unlink()
    before = first.stat().st_mtime_ns
    assert cache.missing_shards() == [1]
    fill(cache, examples, teacher)
    assert not cache.missing_shards()
    assert first.stat().st_mtime_ns == before


def test_another_teacher_other_layers_or_images_have_another_folder(tmp_path, filled, examples):
    keys = {filled[0].key}
    keys.add(make_cache(tmp_path, examples, seed=1)[0].key)
    keys.add(make_cache(tmp_path, examples, layers=(4,))[0].key)
    keys.add(make_cache(tmp_path, make_examples(50, with_prompts=False, num_views=2, seed=5))[0].key)
    teacher = make_teacher()
    teacher.config.vision_config.layer_norm_eps = 1e-3  # not visible in any weight
    teacher = Teacher(teacher, (2, 4), torch.float32)
    keys.add(EmbeddingCache(tmp_path, teacher, examples.num_ids, examples.preprocessing()).key)
    assert len(keys) == 5
    assert make_cache(tmp_path, examples)[0].key == filled[0].key


def test_another_release_of_transformers_reads_the_cache(tmp_path, filled, examples, monkeypatch):
    """Its name is in every config. An upgrade must not double the disk space and the time."""
    monkeypatch.setattr(transformers.configuration_utils, "__version__", "99.0")
    assert make_teacher().config.vision_config.to_dict()["transformers_version"] == "99.0"
    assert make_cache(tmp_path, examples)[0].key == filled[0].key


def test_damage_is_found_when_it_is_read(filled, examples):
    (cache, _), views = filled, examples.views()
    path = cache.folder / "00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = 0
    for example_id in cache.shard_ids(0):
        try:
            cache.read(example_id, views[example_id]["pixel_values"])
        except CacheError as error:
            found += 1
            assert f"example {example_id} is damaged" in str(error)
    assert found == 1
    path.write_bytes(content[:1000])
    with pytest.raises(CacheError, match="missing or damaged .* Delete it, and run again"):
        cache.read(0, views[0]["pixel_values"])


def test_a_file_of_another_cache_is_refused(tmp_path, filled, examples):
    cache, _ = filled
    other, _ = make_cache(tmp_path, examples, seed=1)
    other.folder.mkdir()
    (cache.folder / "00001.safetensors").rename(other.folder / "00001.safetensors")
    with pytest.raises(CacheError, match="written by another teacher or preprocessing"):
        other.read(35, examples.views()[35]["pixel_values"])


def test_values_beyond_float16_are_refused(filled):
    cache, _ = filled
    targets = [torch.full((32, 8, 8, 48), 1e6), torch.zeros(32, 8, 8, 48), torch.zeros(32, 32, 8, 8)]
    with pytest.raises(CacheError, match="the teacher's layer_2 has NaN or values beyond float16"):
        cache.write(0, targets, [0] * 32)


def test_without_num_views_there_is_nothing_to_enumerate():
    with pytest.raises(ValueError, match="num_views=None makes a new view each time"):
        _ = make_examples(5, with_prompts=False).num_ids


def test_an_image_replaced_under_its_name_is_found(filled, examples):
    cache, _ = filled
    pixel_values = examples.views()[3]["pixel_values"].clone()
    cache.read(3, pixel_values)
    pixel_values[0, 0, 0] += 1
    with pytest.raises(CacheError, match="example 3 was made of another image. Delete"):
        cache.read(3, pixel_values)


_RANK = """
import sys, time, torch
from accelerate import PartialState
from samlight_hf.utils.processes import leave_process_group
from tests.distillation.conftest import make_examples
from tests.distillation.test_embedding_cache import fill, make_cache

state = PartialState(cpu=True)
examples = make_examples(50, with_prompts=False, num_views=10)
cache, teacher = make_cache(sys.argv[1], examples)
time.sleep(0.5 * state.process_index)  # the others have begun to write
fill(cache, examples, teacher)
assert not cache.missing_shards(), cache.missing_shards()
leave_process_group()
"""


@pytest.mark.slow
def test_two_ranks_share_the_work(tmp_path):
    (tmp_path / "rank.py").write_text(_RANK)
    torchrun(tmp_path / "rank.py", 2, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 7
