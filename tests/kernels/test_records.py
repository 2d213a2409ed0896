"""What another process has tried is not tried again, as long as everything that the result depends on is the same."""

import pytest
import torch

from samlight_hf.kernels import records
from samlight_hf.kernels import support as triton_support
from samlight_hf.kernels.support import compile_ahead, why_not_tried


pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Records for the CPU, which has none by itself: what is recorded does not depend on the device."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_support, "_warned", set())
    set_machine(monkeypatch, "driver 1")
    new_process(monkeypatch)
    return tmp_path / "cache"


def set_machine(monkeypatch, *properties):
    monkeypatch.setattr(records, "machine_of", lambda device: (device.type, *properties))


def new_process(monkeypatch):
    monkeypatch.setattr(triton_support, "_reasons", {})


def attempts_of(monkeypatch, variant=1, language="Triton", result=True) -> int:
    """Ask in what stands for a new process, twice, and return the number of attempts."""
    new_process(monkeypatch)
    attempts = []
    for _ in range(2):
        reason = why_not_tried("tests", CPU, variant, lambda: (attempts.append(1), result)[1], language)
        assert (reason is None) == result
    return len(attempts)


def test_what_ran_is_not_tried_again(monkeypatch):
    assert [attempts_of(monkeypatch) for _ in range(3)] == [1, 0, 0]
    assert [attempts_of(monkeypatch, (torch.float16, 3)) for _ in range(2)] == [1, 0]
    assert [attempts_of(monkeypatch, language="CUDA") for _ in range(2)] == [1, 0]


@pytest.mark.parametrize("change", ["driver", "sources", "torch", "triton", "setting", "ptxas", "cleared"])
def test_it_is_tried_again_after_a_change(monkeypatch, cache, change):
    assert [attempts_of(monkeypatch) for _ in range(2)] == [1, 0]
    if change == "driver":
        set_machine(monkeypatch, "driver 2")
    elif change == "sources":
        monkeypatch.setattr(records, "_sources", lambda: "others")
    elif change == "setting":
        monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    elif change == "ptxas":
        monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    elif change == "cleared":
        for path in cache.rglob("tried"):
            path.unlink()
    else:
        monkeypatch.setattr({"torch": torch, "triton": records.triton}[change], "__version__", "9.9")
    assert [attempts_of(monkeypatch) for _ in range(2)] == [1, 0]


@pytest.mark.filterwarnings("ignore:the Triton kernel")
def test_what_does_not_run_is_tried_by_each_process(monkeypatch):
    assert [attempts_of(monkeypatch, result=False) for _ in range(2)] == [1, 1]
    assert attempts_of(monkeypatch) == 1  # for example with a compiler that was missing


def test_without_a_place_for_records_each_process_tries(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert [attempts_of(monkeypatch) for _ in range(2)] == [1, 1]


def test_there_are_none_for_a_cpu(monkeypatch, cache):
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    assert [attempts_of(monkeypatch) for _ in range(2)] == [1, 1] and not cache.exists()


def test_a_taken_attempt_is_not_recorded(monkeypatch):
    compile_ahead(lambda: why_not_tried("tests", CPU, 1, lambda: True))
    assert attempts_of(monkeypatch) == 1


def test_the_hash_of_the_sources_covers_kernels_in_both_languages(monkeypatch):
    read, path_type = [], type(records._DRIVER)
    read_bytes = path_type.read_bytes
    monkeypatch.setattr(path_type, "read_bytes", lambda path: (read.append(path.name), read_bytes(path))[1])
    records._sources.cache_clear()
    assert len(records._sources()) == 64
    assert {"linear.py", "tokens_triton.py", "records.py", "linear.cu", "attention.cu", "common.cuh"} <= set(read)
