"""Images given as Python objects give the pixels of their files, and wrong ones one sentence."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from expect import user_error
from PIL import Image

from localagg.data.images.decode import decode
from localagg.data.images.image_dataset import as_source
from localagg.data.images.image_list import ImageList
from localagg.data.sources.open import open_images


class NoArray:
    def __array__(self, *_, **__):
        raise ValueError("broken")


@pytest.fixture(scope="module")
def photo(pictures):
    return pictures / "val" / "flower" / "01.jpg"


def pixels_of(image, **options) -> torch.Tensor:
    return decode(ImageList([image], **options)[0].image)


def test_every_kind_has_the_pixels_of_its_file(photo):
    expected = decode(photo.read_bytes())
    array = np.asarray(Image.open(photo))
    read_only = array.view()
    read_only.flags.writeable = False
    kinds = {
        "str": str(photo),
        "Path": photo,
        "bytes": photo.read_bytes(),
        "bytearray": bytearray(photo.read_bytes()),
        "PIL": Image.open(photo),
        "array": read_only,
        "float array": array / 255,
        "float32 array": (array / 255).astype(np.float32),
        "tensor": expected,
        "float tensor": (expected / 255).requires_grad_(),
        "bfloat16-free half": expected.double() / 255,
        "alpha": np.dstack([array, array[..., :1]]),
    }
    for name, image in kinds.items():
        assert torch.equal(pixels_of(image), expected), name
    mixed = ImageList(list(kinds.values()))
    assert len(mixed) == len(kinds)
    assert all(torch.equal(decode(mixed[i].image), expected) for i in range(len(mixed)))


def test_gray_arrays_become_three_equal_channels():
    gray = np.arange(20, dtype=np.uint8).reshape(4, 5)
    for image in (gray, gray[..., None], torch.from_numpy(gray), torch.from_numpy(gray)[None]):
        found = pixels_of(image)
        assert found.shape == (3, 4, 5)
        assert all(torch.equal(channel, torch.from_numpy(gray)) for channel in found)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_modes_of_pil_are_those_of_files(mode):
    image = Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000)
    image = image if mode == "I;16" else image.convert("L").convert(mode)
    stored = io.BytesIO()
    image.save(stored, "TIFF" if mode == "CMYK" else "PNG")
    assert torch.equal(pixels_of(image), decode(stored.getvalue()))


def test_pil_images_are_turned_as_their_files_are(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = io.BytesIO()
    Image.open(photo).save(stored, "PNG", exif=exif)
    opened = Image.open(io.BytesIO(stored.getvalue()))
    expected = decode(stored.getvalue(), upright=True)
    assert torch.equal(pixels_of(opened, upright=True), expected)
    assert not torch.equal(pixels_of(opened), expected)


def test_one_image_a_stack_and_other_sequences_are_lists(photo):
    assert [len(ImageList(one)) for one in (str(photo), photo, Image.open(photo))] == [1, 1, 1]
    assert len(ImageList(np.zeros((4, 5, 3), np.uint8))) == 1
    assert len(ImageList(np.zeros((7, 4, 5, 3), np.uint8))) == 7
    assert len(ImageList(torch.zeros(7, 3, 4, 5))) == 7
    assert len(ImageList(np.array([str(photo), str(photo)]))) == 2
    assert len(ImageList(str(photo) for _ in range(3))) == 3
    source = open_images("digits")
    assert as_source(source) is source


def test_names_files_and_fingerprints(photo):
    images = ImageList([str(photo), photo.read_bytes()])
    assert (images.name(0), images.file(0)) == (str(photo), photo)
    assert (images.name(1), images.file(1)) == ("image 1", None)
    assert images.stored_bytes() == 2 * photo.stat().st_size
    changed = ImageList([str(photo), b"other"]).fingerprint()
    assert images.fingerprint() == ImageList([photo, photo.read_bytes()]).fingerprint() != changed


@pytest.mark.parametrize(
    ("images", "code", "values"),
    [
        ([], "no-images", []),
        (np.zeros((0, 4, 4, 3), np.uint8), "no-images", []),
        ([np.zeros((4, 4, 3), np.uint8), 3], "option-invalid", ["1", "int"]),
        ([np.zeros((4, 4, 3), np.uint8), None], "option-invalid", ["1", "NoneType"]),
        ([["a.jpg"]], "option-invalid", ["0", "list"]),
        (7, "option-invalid", ["int"]),
        ({"a.jpg": 1}, "option-invalid", ["dict"]),
        ({"a.jpg"}, "option-invalid", ["set"]),
        ([np.zeros((4, 6, 5), np.uint8)], "option-invalid", ["[4, 6, 5]"]),
        ([np.zeros((3, 4, 6), np.uint8)], "option-invalid", ["[3, 4, 6]"]),
        ([torch.zeros(4, 6, 3)], None, []),
        ([torch.zeros(6, 4, 3)], "option-invalid", ["[6, 4, 3]"]),
        ([np.zeros((0, 4, 3), np.uint8)], "option-invalid", ["[0, 4, 3]"]),
        ([np.zeros((4, 4, 3), np.int64)], "option-invalid", ["int64"]),
        ([np.zeros((4, 4, 3), np.uint16)], "option-invalid", ["uint16"]),
        ([np.zeros((4, 4), bool)], "option-invalid", ["bool"]),
        ([np.full((4, 4, 3), 255.0)], "option-invalid", ["255", "0-1"]),
        ([np.full((4, 4, 3), -0.5)], "option-invalid", ["-0.5"]),
        ([torch.full((3, 4, 4), 200.0)], "option-invalid", ["200"]),
        ([np.full((4, 4, 3), np.nan)], "option-invalid", ["nan"]),
        (["nothing.jpg"], "not-found", ["nothing.jpg"]),
        ("", "not-found", ["''"]),
        ("https://host/a.jpg", "not-found", ["https://host/a.jpg"]),
        ("/dev/zero", "not-found", ["/dev/zero"]),  # never ends
        ("a" * 5000, "not-found", ["aaa"]),
        ("a\0.jpg", "not-found", ["a\\x00.jpg"]),
        (io.BytesIO(b"x"), "option-invalid", ["BytesIO"]),
        (pd.DataFrame({"path": ["a.jpg"]}), "option-invalid", ["DataFrame"]),
        (np.array(3.0), "option-invalid", ["[]"]),
        (np.array(None), "option-invalid", ["[]"]),
        (np.array("a.jpg"), "option-invalid", ["[]"]),
        (torch.zeros(5, 5, 3), "option-invalid", ["[5, 5, 3]"]),
        ([torch.zeros(3, 4, 4).to_sparse()], "option-invalid", ["0"]),
        ([torch.zeros(3, 4, 4, device="meta")], "option-invalid", ["0"]),
        ([Image.new("RGB", (0, 4))], "option-invalid", ["0"]),
        ([NoArray()], "option-invalid", ["0", "NoArray", "broken"]),
    ],
)
def test_wrong_inputs_give_one_sentence(images, code, values):
    if code is None:  # four channels of 6 x 3: a tensor's channels come first
        assert pixels_of(images[0]).shape == (3, 6, 3)
        return
    with user_error(code, *values):
        ImageList(images)


def test_a_folder_is_no_image(tmp_path):
    with user_error("not-found", tmp_path, "open_images"):
        ImageList([tmp_path])


def test_labels_that_are_no_classes_are_refused(photo):
    class Numbered:
        targets = np.array([0, 1_500_000])

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return np.asarray(Image.open(photo)), int(self.targets[index])

    with user_error("unsupported", "1,500,000"):
        as_source(Numbered())
