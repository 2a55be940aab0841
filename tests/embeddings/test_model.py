"""One object in Python: the numbers of the command line, pickled, from threads, wrong inputs."""

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from expect import user_error
from huggingface_hub import constants
from PIL import Image

import localagg
from embeddings import VIEWS, save_small_encoder
from localagg.checkpoint import EXPORTED_NAME, load_bank
from localagg.config import PretrainConfig, ViewConfig, override
from localagg.data.images.augment import evaluation_view
from localagg.data.images.decode import decode
from localagg.embeddings.embed import embed


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A run of one epoch on the pictures."""
    config = override(
        PretrainConfig(),
        model="resnet18_small", width=8, blocks=(1, 1), dim=12, image_size=16, epochs=1,
        ir_epochs=1, batch_size=24, workers=0, device="cpu", precision="32-true",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("runs") / "mine"
    localagg.pretrain(config, str(pictures), folder)
    return folder


@pytest.fixture(scope="module")
def files(pictures):
    return sorted((pictures / "val").rglob("*.jpg"))


def test_rows_are_those_of_embed_on_the_folder(run, pictures):
    model = localagg.load(run)
    source = localagg.open_images(str(pictures), "val")
    expected = embed(model.encoder, source, model.views, batch=5).rows.numpy()
    files = [pictures / "val" / source.name(i) for i in range(len(source))]
    rows = model.embed(files)
    assert (rows.dtype, rows.shape) == (np.float32, (12, 12))
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    np.testing.assert_allclose(model.embed(source), expected, atol=1e-6)
    np.testing.assert_allclose(model.embed(files[3]), expected[3:4], atol=1e-6)


def test_features_are_the_read_out_layers_or_their_maps(run, files):
    model = localagg.load(str(run))
    views = torch.stack(
        [evaluation_view(decode(f.read_bytes())[None], model.views)[0] for f in files]
    )
    with torch.no_grad():
        expected = model.encoder.features(views, model.layers)
        maps = model.encoder.backbone.maps((views - model.encoder.mean) / model.encoder.std)
    found = model.features(files, [0, "2"])
    assert list(found) == ["0", "2"]
    for name, values in found.items():  # views of files are whole levels
        np.testing.assert_allclose(values, expected[name].numpy(), atol=0.05)
    for name, values in model.features(files, model.layers, flatten=False).items():
        assert values.shape == maps[name].shape
    assert model.preprocess(files).shape == (len(files), 3, 16, 16)
    for layers in ([], None):
        with user_error("option-missing", *model.layers):
            model.features(files, layers)
    for layer in (1, np.int64(1), np.array([1])):
        assert list(model.features(files[:1], layer)) == ["1"]
    for wrong in ("conv7", 1.5, -1):
        with user_error("option-unknown", wrong):
            model.features(files, wrong)


def test_programs_that_hook_modules_by_name_see_the_maps(run, files):
    """As thingsvision (a view of each image, by named_modules) and Brain-Score (of all paths)."""
    model, seen = localagg.load(run), {}
    expected = model.features(files, ["1"], flatten=False)["1"]
    name = model.encoder.layer_modules["1"]
    hooked = dict(model.encoder.named_modules())[name]
    hooked.register_forward_hook(lambda module, inputs, output: seen.update({name: output}))
    one_by_one = torch.stack([model.preprocess(Image.open(file))[0] for file in files])
    for views in (one_by_one, torch.stack([*model.preprocess(list(map(str, files)))])):
        with torch.no_grad():
            model.encoder(views)
        np.testing.assert_allclose(seen.pop(name).numpy(), expected, atol=1e-5)


def test_the_bank_s_nearest_rows_have_paths_and_similarities(run, pictures):
    model = localagg.load(run)
    source = localagg.open_images(str(pictures))
    queries = model.embed(source)[:5] * 3  # of any length
    bank = torch.nn.functional.normalize(load_bank(run).double(), dim=1).numpy()
    similarity = queries.astype(np.float64) / 3 @ bank.T
    found = model.nearest(queries, k=4)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(found.index, order)
    np.testing.assert_allclose(
        found.similarity, np.take_along_axis(similarity, order, 1), atol=1e-5
    )
    assert found.paths == [[source.name(i) for i in line] for line in order]
    assert model.nearest(queries, k=1000).index.shape == (5, len(source))
    same = (queries.tolist(), queries.astype(">f4"), queries[::-1][::-1], queries * 1e30)
    for rows in (*same, torch.from_numpy(queries).requires_grad_()):
        np.testing.assert_array_equal(model.nearest(rows, k=np.int64(4)).index, order)
    texts, no_direction = np.full((2, 12), "a"), queries * [[1], [1], [0], [1], [1]]
    for rows in (queries[0], queries[:, :5], [[1, 2]], [[1], [2, 3]], "rows", None, texts):
        with user_error("option-invalid", 12):
            model.nearest(rows)
    with user_error("option-invalid", "Row 2"):
        model.nearest(no_direction)
    for k in (0, -1, 1.5, "3"):
        with user_error("option-invalid", k):
            model.nearest(queries, k)
    with user_error("not-finite"):
        model.nearest(queries * np.nan)


def test_images_that_were_not_learned_are_no_neighbors(pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures / "train", data)
    bad = sorted(path for path in data.rglob("*") if path.is_file())[3]
    bad.write_bytes(b"nothing")
    config = override(
        PretrainConfig(),
        model="resnet18_small", width=8, blocks=(1,), dim=12, image_size=16, epochs=1, ir_epochs=1,
        batch_size=24, workers=0, device="cpu", unreadable="skip", eval_every=0,
    )  # fmt: skip
    localagg.pretrain(config, str(data), tmp_path / "run")
    bank = load_bank(tmp_path / "run").float()
    found = localagg.load(tmp_path / "run", device="cpu").nearest(bank[[5]].numpy(), k=1000)
    assert sorted(found.index[0]) == [i for i in range(48) if i != 3]
    assert found.index[0][0] == 5
    assert str(bad.relative_to(data)) not in found.paths[0]


def test_a_bank_of_other_images_or_none_is_reported(run, pictures, tmp_path):
    import shutil

    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    config = (moved / "config.json").read_text()
    (moved / "config.json").write_text(config.replace(f'"{pictures}"', '"digits"'))
    model = localagg.load(moved)
    with user_error("mismatch", "digits", moved):
        model.nearest(np.eye(12, dtype=np.float32))
    weights, _ = save_small_encoder(tmp_path / "w.safetensors")
    with user_error("unsupported"):
        localagg.load(weights).nearest(np.eye(12, dtype=np.float32))


def test_it_is_pickled_and_used_from_threads(run, files):
    model = localagg.load(run)
    expected = model.embed(files)
    model.nearest(expected)
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.embed(files), expected)
    np.testing.assert_array_equal(copy.nearest(expected).index, model.nearest(expected).index)
    with ThreadPoolExecutor(4) as threads:
        for rows in threads.map(model.embed, [files] * 8):
            np.testing.assert_array_equal(rows, expected)
    assert not model.encoder.training
    assert all(p.grad is None for p in model.encoder.parameters())


def test_weights_files_and_exported_folders_load(tmp_path, files):
    weights, encoder = save_small_encoder(tmp_path / "w.safetensors")
    model = localagg.load(weights, device="cpu")
    assert (model.views, model.dim, model.layers) == (VIEWS, 12, encoder.layers)
    (tmp_path / "hub").mkdir()
    save_small_encoder(tmp_path / "hub" / EXPORTED_NAME)
    np.testing.assert_array_equal(localagg.load(tmp_path / "hub").embed(files), model.embed(files))
    larger = localagg.load(weights, views=ViewConfig(image_size=24, eval_crop=1))
    assert larger.preprocess(files[0]).shape == (1, 3, 24, 24)


def test_hub_names_are_downloaded_once(tmp_path, monkeypatch, files):
    """From the library's cache, as no test has a network."""
    commit = "0" * 40
    repository = tmp_path / "models--me--birds"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    save_small_encoder(snapshot / EXPORTED_NAME)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("me/birds", "hf:me/birds"):
        assert localagg.load(name).embed(files).shape == (len(files), 12)
    with user_error("not-found", "me/nothing"):
        localagg.load("me/nothing")


def test_what_is_not_there_gives_one_sentence(run, tmp_path):
    for missing in (tmp_path / "none", "nothing", "a/b/c"):
        with user_error("not-found", missing):
            localagg.load(missing)
    with user_error("option-invalid", "n" * 40):
        localagg.load("n" * 5000)
    with user_error("option-invalid", "gpu"):
        localagg.load(run, device="gpu")
    for option in ("views", "backbone"):
        with user_error("option-invalid", option, 3):
            localagg.load(run, **{option: 3})
    with user_error("unreadable-images", "bad.jpg"):
        (tmp_path / "bad.jpg").write_bytes(b"nothing")
        localagg.load(run).embed([tmp_path / "bad.jpg"])
    assert Path(run).is_dir()
