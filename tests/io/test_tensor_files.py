import resource
import zipfile

import pytest
import torch
from expect import user_error
from safetensors import safe_open
from safetensors.torch import load_file

from localagg.io.tensor_files import DTYPE_NAMES, load_pickled, save_tensors


def test_the_library_reads_all_dtypes_back(tmp_path):
    tensors = {
        f"t.{number}": torch.randint(0, 2, (number, 3), dtype=torch.int8).to(dtype)
        for number, dtype in enumerate(DTYPE_NAMES)
    }
    tensors |= {"scalar": torch.tensor(2.5), "transposed": torch.arange(6.0).view(2, 3).T}
    metadata = {"localagg": '{"é": "\\n"}'}
    save_tensors(tmp_path / "x.safetensors", tensors, metadata)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == metadata


def test_a_file_without_tensors_is_valid(tmp_path):
    save_tensors(tmp_path / "none", {})
    assert load_file(tmp_path / "none") == {}


def test_a_full_disk_raises_the_error_of_the_system(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            save_tensors(tmp_path / "x", {"x": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text", "torch.save"),
        ("cut", "cut short"),
        ("renamed", ".safetensors"),
        ("program", "Torch"),
    ],
)
def test_files_that_torch_cannot_load_are_described(tmp_path, name, words):
    torch.save({"a": torch.ones(9)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "text").write_text("no tensors")
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    save_tensors(tmp_path / "renamed", {"a": torch.ones(9)})
    with zipfile.ZipFile(tmp_path / "program", "w") as archive:
        archive.writestr("program/constants.pkl", b"")
    with user_error("unsupported", tmp_path / name, words, "advice"):
        load_pickled(tmp_path / name, [], "advice")
