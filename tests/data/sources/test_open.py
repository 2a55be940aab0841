import os
import shutil

import pytest
import torch
from expect import user_error

from localagg.data import open_evaluation, open_images
from localagg.data.images.decode import decode
from localagg.data.sources.open import stored_splits
from localagg.data.sources.splits import split_in_name
from localagg.evaluation.knn_queries import select_queries
from localagg.evaluation.readouts.readout_inputs import open_labeled


@pytest.fixture(scope="module")
def table(pictures, tmp_path_factory):
    """The pictures as Parquet and as a saved dataset, written by Hugging Face datasets."""
    import datasets

    root = tmp_path_factory.mktemp("tables")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(pictures), cache_dir=str(root / "c"))
    parquet = root / "parquet"
    parquet.mkdir()
    for split, name in (("train", "train"), ("validation", "test")):
        loaded[split].to_parquet(parquet / f"{name}-00000-of-00001.parquet")
    loaded.save_to_disk(root / "saved")
    return root


def test_a_folder_is_sorted_split_and_labeled(pictures):
    source = open_images(pictures)
    assert len(source) == 48
    assert source.classes == ["flower", "temple"]
    names = [source.name(i) for i in range(48)]
    assert names == sorted(names)
    assert source[30].index == 30
    assert source[30].label == 1
    assert source[30].image == (pictures / "train" / names[30]).read_bytes()
    assert len(open_images(pictures, "val")) == 12


def test_a_folder_without_classes_has_no_labels(pictures):
    source = open_images(pictures / "train" / "temple")
    assert (len(source), source.labels, source.classes) == (24, None, None)
    assert source[0].label is None
    assert open_evaluation(pictures / "train") is None


@pytest.fixture
def copied(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "copied")
    return tmp_path / "copied"


def test_held_out_images_of_one_of_the_classes_are_labelled(copied):
    shutil.rmtree(copied / "val" / "flower")
    held_out = open_images(copied, "val")
    assert (held_out.classes, held_out.labels.tolist()) == (["temple"], [0] * 6)
    labelled = open_labeled(str(copied))
    assert labelled.held_out_labels.tolist() == [1] * 6  # in training's numbers
    choice = select_queries(str(copied), open_images(copied), torch.arange(48))
    assert choice.held_out is not None
    assert choice.query_labels.tolist() == [1] * 6


def test_a_stray_held_out_image_has_no_label_and_the_others_keep_theirs(copied):
    shutil.copy(copied / "val" / "temple" / "01.jpg", copied / "val" / "a.jpg")
    held_out = open_images(copied, "val")
    assert held_out.name(0) == "a.jpg"
    assert held_out.labels.tolist() == [-1] + [0] * 6 + [1] * 6
    choice = select_queries(str(copied), open_images(copied), torch.arange(48))
    assert choice.held_out is not None
    assert len(choice.query_index) == 12
    assert choice.left_out["asking"]["unlabelled"] == 1
    assert len(open_labeled(str(copied)).held_out) == 12


def test_one_held_out_folder_that_is_no_class_has_no_labels(copied):
    """How the held-out images of a contest come."""
    shutil.rmtree(copied / "val" / "flower")
    (copied / "val" / "temple").rename(copied / "val" / "images")
    assert open_images(copied, "val").labels is None
    shutil.rmtree(copied / "train" / "flower")  # and training of one folder has no classes
    (copied / "val" / "images").rename(copied / "val" / "temple")
    assert open_images(copied, "val").labels is None


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_equal_the_folder_they_were_made_from(table, pictures, kind):
    source, folder = open_images(table / kind), open_images(pictures)
    assert len(source) == len(folder)
    assert source.classes == folder.classes
    assert torch.equal(source.labels, folder.labels)
    for i in (0, 13, 47):
        assert torch.equal(decode(source[i].image), decode(folder[i].image))
        assert source[i].label == folder[i].label
    assert len(open_images(table / kind, "val")) == 12
    single = open_images(next((table / "parquet").glob("train*")))
    assert single.fingerprint() == open_images(table / "parquet").fingerprint()


def test_class_folders_are_numbered_in_sorted_order(pictures, tmp_path):
    for wnid in ("n02105855", "n01440764", "n0"):
        (tmp_path / "train" / wnid).mkdir(parents=True)
        for i in range(3):
            shutil.copy(
                pictures / "val" / "temple" / "00.png", tmp_path / "train" / wnid / f"{i}.JPEG"
            )
    source = open_images(tmp_path)
    assert source.classes == ["n0", "n01440764", "n02105855"]
    assert source.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert source.name(0) == "n0/0.JPEG"


def test_the_splits_that_are_there_are_named(pictures, table, tmp_path):
    assert stored_splits(pictures) == ["train", "val"]
    assert stored_splits(table / "parquet") == ["train", "test"]
    assert stored_splits(table / "saved") == ["train", "val"]
    assert stored_splits(pictures / "val") == ["train"]
    assert stored_splits("digits") == ["train", "val"]


def test_the_split_of_the_digits_is_fixed():
    train, held_out = open_images("digits"), open_images("digits", "val")
    assert (len(train), len(held_out)) == (1400, 397)
    assert train[5].image.shape == (3, 8, 8)
    assert sorted(train.labels.unique().tolist()) == list(range(10))
    assert train.fingerprint() == open_images("digits").fingerprint() != held_out.fingerprint()


def test_the_fingerprint_follows_the_content(pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / "copy")
    first = open_images(tmp_path / "copy").fingerprint()
    assert first == open_images(pictures).fingerprint()
    (tmp_path / "copy" / "flower" / "00.png").rename(tmp_path / "copy" / "flower" / "zz.png")
    assert open_images(tmp_path / "copy").fingerprint() != first


@pytest.mark.parametrize(
    ("uri", "code", "value"),
    [
        ("{}/none", "not-found", "none"),
        ("{}/empty", "no-images", "empty"),
        ("{}/a.txt", "unsupported", "a.txt"),
        ("{}/a.parquet", "damaged", "a.parquet"),
        ("digit", "not-found", "'digits'?"),
        ("{0}/none.csv:{0}", "not-found", "none.csv"),
    ],
)
def test_other_uris_raise_with_their_name(tmp_path, uri, code, value):
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "a.parquet"):
        (tmp_path / name).write_text("x")
    with user_error(code, uri.format(tmp_path), value):
        open_images(uri.format(tmp_path))


def test_a_table_without_images_names_its_columns(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a"], "n": [1]}).to_parquet(tmp_path / "t.parquet")
    with user_error("no-images", "text, n"):
        open_images(tmp_path / "t.parquet")


def test_a_missing_split_names_those_there_are(table):
    with user_error("not-found", "'val'", "train"):
        open_images(next((table / "parquet").glob("train*")), "val")
    with user_error("not-found", "'dev'", "test"):
        open_images(table / "parquet", "dev")


def test_broken_and_circular_links_are_harmless(pictures, tmp_path):
    shutil.copytree(pictures / "val", tmp_path / "a")
    (tmp_path / "a" / "flower" / "back").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "flower" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "a" / "wall").symlink_to(pictures / "train" / "temple")  # another folder is meant
    source = open_images(tmp_path / "a")
    assert len(source) == 12 + 1 + 24
    assert source.classes == ["flower", "temple", "wall"]
    gone = source.paths.index("flower/gone.jpg")
    with pytest.raises(OSError, match="No such file"):
        source[gone]
    assert len(source.fingerprint()) == 64


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00012", "train"),
        ("val_0", "val"),
        ("test0", "test"),
        ("validation.0", "validation"),
        ("set-val-0", "val"),
        ("VAL-0", "val"),
        ("val2017", "val"),
        ("my valid 3", "valid"),
        ("TestSet", "test"),
        ("trainset_test", "train"),  # the first counts
        ("values", "train"),
        ("latest-0", "train"),
        ("0000", "train"),
    ],
)
def test_the_split_of_a_file_is_a_part_of_its_name(name, split):
    assert split_in_name(name) == split


@pytest.mark.parametrize("held_out", ["val_0", "test0", "validation.0", "set-val-0", "VAL-0"])
def test_held_out_tables_are_no_training_data(tmp_path, held_out):
    import pyarrow as pa
    from pyarrow import parquet

    for name, count in (("train_0", 3), (held_out, 2)):
        table = pa.table({"image": [f"{name} {i}".encode() for i in range(count)]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    assert len(open_images(tmp_path)) == 3
    assert open_evaluation(tmp_path)[1].image == f"{held_out} 1".encode()


def test_names_of_split_folders_may_have_any_case(pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / "Train")
    shutil.copytree(pictures / "val", tmp_path / "TEST")
    assert stored_splits(tmp_path) == ["train", "test"]
    source = open_images(tmp_path)
    assert (len(source), source.classes) == (48, ["flower", "temple"])
    assert len(open_evaluation(tmp_path)) == 12
    shutil.copytree(pictures / "val", tmp_path / "train")
    with user_error("mismatch", tmp_path, "Train and train"):
        open_images(tmp_path)


def test_folders_of_splits_alone_are_no_classes(pictures, tmp_path):
    for split in ("val", "test"):
        shutil.copytree(pictures / "val", tmp_path / split)
    with user_error("not-found", "'train'", "val, test"):
        open_images(tmp_path)


def test_split_folders_beside_other_folders_of_images_raise(pictures, tmp_path):
    """Were ``train`` a class, the others would be lost; were it a split, nothing would tell."""
    for name in ("train", "bus", "car"):
        shutil.copytree(pictures / "val" / "temple", tmp_path / "a" / name)
    with user_error("mismatch", tmp_path / "a", "train, ", "bus, car"):
        open_images(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a").rename(tmp_path / "b" / "train")  # the way out that is named
    assert open_images(tmp_path / "b").classes == ["bus", "car", "train"]
    (tmp_path / "b" / "notes").mkdir()
    (tmp_path / "b" / "notes" / "about.txt").write_text("no image")
    (tmp_path / "b" / ".thumbnails").mkdir()
    shutil.copy(pictures / "val" / "temple" / "00.png", tmp_path / "b" / ".thumbnails")
    (tmp_path / "b" / "latest").symlink_to("train")
    (tmp_path / "b" / "all").symlink_to(tmp_path)
    assert len(open_images(tmp_path / "b")) == 18


def test_links_to_each_other_end(pictures, tmp_path):
    """Three folders with links to both others, and fifty in a ring: more than a path may have."""
    picture = pictures / "val" / "temple" / "00.png"
    for number in range(53):
        folder = tmp_path / ("three" if number < 3 else "ring") / f"{number:02d}"
        folder.mkdir(parents=True)
        shutil.copy(picture, folder)
        others = {0, 1, 2} - {number} if number < 3 else [(number - 2) % 50 + 3]
        for other in others:
            (folder / f"to_{other}").symlink_to(f"../{other:02d}")
    assert len(set(open_images(tmp_path / "three").paths)) == 9
    assert len(open_images(tmp_path / "ring")) == 100


def test_links_below_a_link_are_followed_once(pictures, tmp_path):
    shutil.copytree(pictures / "val", tmp_path / "far" / "1")
    (tmp_path / "far" / "2").mkdir()
    (tmp_path / "far" / "2" / "more").symlink_to("../1")
    (tmp_path / "far" / "1" / "back").symlink_to("../2")
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "b").symlink_to(tmp_path / "far" / "2")
    paths = open_images(tmp_path / "root").paths
    assert len(paths) == 12
    assert all(path.startswith("a/b/more/") for path in paths)


def test_only_files_are_images(pictures, tmp_path):
    shutil.copytree(pictures / "val" / "temple", tmp_path / "a")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (tmp_path / "a" / "link.jpg").symlink_to("pipe.jpg")
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "a" / "again.jpg").symlink_to("00.png")
    source = open_images(tmp_path)
    assert [path for path in source.paths if path[:3] not in ("a/0", "a/1")] == ["a/again.jpg"]
    assert len(source) == 7
