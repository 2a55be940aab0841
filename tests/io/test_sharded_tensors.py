import pytest
import torch
from safetensors.torch import save_file

from localagg.distributed.collectives import share
from localagg.io.sharded_tensors import find_shards, read_shards, shard_path


@pytest.mark.parametrize("size", [2, 7, 12])
@pytest.mark.parametrize("dim", [0, 1])
def test_any_number_of_ranks_reads_the_shards_of_any_number(tmp_path, size, dim):
    whole = torch.arange(size * 3).view(size, 3) if dim == 0 else torch.arange(size * 3).view(3, -1)
    for writers in (1, 2, 4):
        folder = tmp_path / str(writers)
        folder.mkdir()
        for rank in range(writers):
            part = share(size, rank, writers)
            rows = whole.narrow(dim, part.start, len(part)).contiguous()
            save_file({"x": rows}, shard_path(folder, "bank", rank, writers))
        files = find_shards(folder, "bank")
        assert torch.equal(read_shards(files, "x", dim=dim), whole)
        for readers in (1, 2, 3, 5):
            for rank in range(readers):
                part = share(size, rank, readers)
                found = read_shards(files, "x", dim=dim, part=part)
                assert torch.equal(found, whole.narrow(dim, part.start, len(part)))
        with pytest.raises(ValueError, match=rf"\b{size}\b.*\b{size + 1}\b"):
            read_shards(files, "x", dim=dim, part=range(1, size + 1))


def test_a_missing_shard_is_named(tmp_path):
    assert find_shards(tmp_path, "bank") == []
    save_file({"x": torch.zeros(1)}, shard_path(tmp_path, "bank", 1, 3))
    with pytest.raises(FileNotFoundError, match=r"bank-0-of-3\.safetensors"):
        find_shards(tmp_path, "bank")
