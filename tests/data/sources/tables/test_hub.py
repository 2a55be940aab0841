"""Data sets of the Hub, without a network: a Hub that is a local folder, and one that fails."""

import pytest
import torch
from expect import user_error
from tables import embedded

from localagg.data import open_images
from localagg.data.sources.open import stored_splits


@pytest.fixture(scope="module")
def repository(pictures, tmp_path_factory):
    """A data set as it lies on the Hub: Parquet and a card, with two configurations."""
    import datasets

    root = tmp_path_factory.mktemp("hub")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(pictures), cache_dir=str(root / "c"))
    for config, keep in (("all", 48), ("few", 5)):
        folder = root / "set" / config
        folder.mkdir(parents=True)
        stored = loaded["train"].select(range(keep)), loaded["validation"]
        for name, split in zip(("train", "validation"), stored, strict=True):
            embedded(split).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    card = ["---", "configs:"]
    for config in ("all", "few"):
        card += [f"- config_name: {config}", f"  data_dir: {config}"]
    (root / "set" / "README.md").write_text("\n".join([*card, "---", ""]))
    return root / "set"


@pytest.fixture(autouse=True)
def hub(repository, pictures, monkeypatch, tmp_path):
    """``datasets`` with two data sets on its Hub."""
    import datasets

    real, there = datasets.load_dataset, {"me/set": repository, "me/pictures": pictures}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config: real(str(there.get(name, name)), config, cache_dir=str(tmp_path)),
    )


def test_a_data_set_equals_the_folder_it_was_made_from(pictures):
    source, folder = open_images("hf:me/set:all"), open_images(pictures)
    assert len(source) == 48
    assert source.classes == folder.classes
    assert torch.equal(source.labels, folder.labels)
    assert [source[i].image for i in range(48)] == [folder[i].image for i in range(48)]
    assert stored_splits("hf:me/set:all") == ["train", "val"]
    assert len(open_images("hf:me/set:few")) == 5
    assert len(open_images("hf:me/set:few", "val")) == 12
    again = open_images("hf:me/set:all")
    assert again.fingerprint() == source.fingerprint()


def test_files_that_a_table_only_names_are_read(pictures):
    source, folder = open_images("hf:me/pictures"), open_images(pictures)
    assert [source[i].image for i in range(48)] == [folder[i].image for i in range(48)]
    assert source.stored_bytes() == folder.stored_bytes()


@pytest.mark.parametrize(
    ("uri", "code", "value"),
    [
        ("hf:", "option-invalid", "hf:NAME"),
        ("hf:me/set:none", "not-found", "none"),
        ("hf:/no/such/folder", "not-found", "/no/such/folder"),
        ("hf:/tmp", "option-invalid", "'/tmp'"),
    ],
)
def test_a_missing_data_set_raises_one_sentence(uri, code, value):
    with user_error(code, value) as caught:
        open_images(uri)
    assert "\n" not in str(caught.value)


def test_any_error_of_the_hub_is_one_sentence(monkeypatch):
    import datasets

    def fail(*_):
        raise type("Strange", (Exception,), {})("Could not connect\n\n to the Hub.\nTraceback")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with user_error("not-found", "'hf:a/b'", "Could not connect to the Hub;"):
        open_images("hf:a/b")


def test_a_missing_network_is_reported(monkeypatch, tmp_path):
    """The real client in its offline mode."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with user_error("not-found", "'hf:localagg/none'", "network"):
        open_images("hf:localagg/none")
