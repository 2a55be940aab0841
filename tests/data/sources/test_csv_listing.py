"""Listings: Places205's CSV over real images."""

import csv
import json
import os
import pickle
import shutil

import pytest
from expect import user_error

from localagg.data import open_evaluation, open_images
from localagg.data.inspect.inspect_dataset import inspect
from localagg.data.sources.csv_listing import PLACES_FOLDER
from localagg.data.sources.listing_table import read_listing


@pytest.fixture
def tree(pictures, tmp_path):
    """images/temple/*, images/flower/* and lists/."""
    shutil.copytree(pictures / "train", tmp_path / "images")
    (tmp_path / "lists").mkdir()
    return tmp_path


def write(path, *lines, end="\n"):
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


LINES = ("temple/01.jpg 3", "flower/00.png 0", "temple/02.jpg 3")


def test_the_lines_are_the_order_and_the_numbers_the_labels(tree):
    source = open_images(f"{write(tree / 'lists' / 'a.csv', *LINES)}:{tree / 'images'}")
    assert [source.name(i) for i in range(3)] == ["temple/01.jpg", "flower/00.png", "temple/02.jpg"]
    assert source.labels.tolist() == [3, 0, 3]
    assert source.classes == ["0", "1", "2", "3"]
    assert source[1].image == (tree / "images" / "flower" / "00.png").read_bytes()
    assert (source[1].index, source[1].label) == (1, 0)
    assert source.stored_bytes() == sum(len(source[i].image) for i in range(3))
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


def test_the_root_is_the_folder_of_the_csv_by_default(tree):
    beside = open_images(write(tree / "images" / "a.csv", *LINES))
    elsewhere = open_images(f"{write(tree / 'a.csv', *LINES)}:{tree / 'images'}")
    assert beside.fingerprint() == elsewhere.fingerprint()
    with user_error("not-found", "first 3 images", tree / "a.csv", "temple/01.jpg"):
        open_images(tree / "a.csv")
    with user_error("not-found", tree / "none"):
        open_images(f"{tree / 'a.csv'}:{tree / 'none'}")


@pytest.mark.parametrize("separator", [" ", "\t", ",", ", ", "   "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_line_ends_blank_lines_and_a_byte_order_mark(tree, separator, end):
    lines = [line.replace(" ", separator) for line in LINES]
    lines = ["\ufeff" + lines[0], "", lines[1], "   ", lines[2]]
    path = write(tree / "images" / "a.csv", *lines, end=end)
    source = open_images(path)
    assert (source.paths, source.malformed) == ([x.split()[0] for x in LINES], [])


def test_names_with_blanks_and_other_bytes_than_text(tree):
    picture = (tree / "images" / "temple" / "01.jpg").read_bytes()
    for name in (b"a b.jpg", b"caf\xe9.jpg", b"7.jpg"):
        (tree / "images" / name.decode("utf-8", "surrogateescape")).write_bytes(picture)
    (tree / "images" / "a.csv").write_bytes(b"a b.jpg 1\ncaf\xe9.jpg 2\n7.jpg 3\n")
    source = open_images(tree / "images" / "a.csv")
    assert [source[i].image for i in range(3)] == [picture] * 3
    assert source.labels.tolist() == [1, 2, 3]
    assert len(source.fingerprint()) == 64


@pytest.mark.parametrize("separator", [",", "\t", " "])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_output_of_pythons_csv_is_read(tree, separator, quoting):
    """Names with every separator and with quotes."""
    names = ["a b.jpg", "c,d.jpg", "e\tf.jpg", 'g"h.jpg', '"i".jpg', "7.jpg", "j, 5"]
    for name in names:
        shutil.copy(tree / "images" / "temple" / "01.jpg", tree / "images" / name)
    with open(tree / "images" / "a.csv", "w", newline="") as file:
        csv.writer(file, delimiter=separator, quoting=quoting).writerows(
            zip(names, range(7), strict=True)
        )
    source = open_images(tree / "images" / "a.csv")
    assert (source.paths, source.labels.tolist()) == (names, list(range(7)))
    assert len({source[i].image for i in range(7)}) == 1


def test_a_quoted_number_behind_a_path_with_blanks(tree):
    shutil.copy(tree / "images" / "temple" / "01.jpg", tree / "images" / "a b.jpg")
    source = open_images(write(tree / "images" / "a.csv", *LINES, 'a b.jpg,"5"'))
    assert (source.paths[3], source.labels[3].item()) == ("a b.jpg", 5)


@pytest.mark.parametrize(
    "line", ['"x.jpg 1', '"x.jpg" y 1', '"x.jpg",1,2', '"x.jpg"', '"x.jpg","z"']
)
def test_invalid_quotes_are_malformed(tree, line):
    assert open_images(write(tree / "images" / "a.csv", *LINES, line)).malformed == [4]


def test_a_pair_in_a_folder_is_its_splits(tree, capsys):
    write(tree / "lists" / "train_places205.csv", *LINES)
    write(tree / "lists" / "val_places205.csv", "flower/05.jpg 0")
    (tree / "lists" / "labels.csv").write_text("not a list\n")
    uri = f"{tree / 'lists'}:{tree / 'images'}"
    assert len(open_images(uri)) == 3
    assert open_evaluation(uri).paths == ["flower/05.jpg"]
    write(tree / "lists" / "train_other.csv", *LINES)
    with user_error("mismatch", "train_other.csv", "train_places205.csv"):
        open_images(uri)
    assert open_evaluation(f"{tree / 'lists' / 'train_other.csv'}:{tree / 'images'}") is None


def test_a_csv_in_a_folder_of_images_is_ignored(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "p")
    write(tmp_path / "p" / "train_labels.csv", "id label")
    assert len(open_images(tmp_path / "p")) == 48


def test_places_long_folder_is_found_below_the_root(tree):
    (tree / PLACES_FOLDER).parent.mkdir(parents=True)
    shutil.move(tree / "images", tree / PLACES_FOLDER)
    source = open_images(f"{write(tree / 'lists' / 'a.csv', *LINES)}:{tree}")
    assert source[0].image == (tree / PLACES_FOLDER / "temple" / "01.jpg").read_bytes()
    direct = open_images(f"{tree / 'lists' / 'a.csv'}:{tree / PLACES_FOLDER}")
    assert direct.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("slash", ["/", "//", "{root}/"])
def test_a_leading_slash_means_the_root(tree, slash):
    lines = [slash.format(root=tree / "images") + line for line in LINES]
    source = open_images(write(tree / "images" / "a.csv", *lines))
    assert source.paths == [line.split()[0] for line in LINES]


@pytest.mark.parametrize(
    "path",
    [
        "../secret.jpg",
        "temple/../../secret.jpg",
        "/secret.jpg",
        "/etc/passwd",
        "//etc/passwd",
        "/",
        "{root}/../secret.jpg",
        "..",
        "temple\\..\\..\\secret.jpg",
    ],
)
def test_a_path_out_of_the_root_is_unsafe(tree, path):
    (tree / "secret.jpg").write_bytes((tree / "images" / "temple" / "01.jpg").read_bytes())
    table = write(
        tree / "images" / "a.csv", *LINES, path.format(root=tree / "images") + " 1", LINES[0]
    )
    with user_error("unsafe", "Line 4", table):
        open_images(table)


MALFORMED = [
    "malformed_line_without_label",
    "temple/01.jpg",
    "temple/01.jpg x",
    "temple/01.jpg -1",
    "temple/01.jpg 3 x",
    "temple/01.jpg3",
    " 5",
    "5",
    "a\0b.jpg 1",
    "temple/01.jpg 1000000",
    "temple/01.jpg " + "9" * 5000,
    "x" * 20_000 + " 1",
    "x" + " " * 300_000 + "1",
]


@pytest.mark.parametrize("line", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_lines_are_reported_by_number(tree, line, capsys):
    table = write(tree / "images" / "a.csv", LINES[0], LINES[1], line, LINES[2])
    source = open_images(table)
    assert (source.paths, source.malformed) == ([x.split()[0] for x in LINES], [3])
    assert source[2].image == (tree / "images" / "temple" / "02.jpg").read_bytes()
    assert "lines 3 (3 images" in " ".join(capsys.readouterr().err.split())


def test_many_malformed_lines_are_counted(tree, capsys):
    table = write(tree / "images" / "a.csv", *["x"] * 11, *LINES * 4)
    assert open_images(table).malformed == list(range(1, 12))
    printed = " ".join(capsys.readouterr().err.split())
    assert "lines 1, 2, 3, 4, 5, 6, 7, 8 and 3 more " in printed


@pytest.mark.parametrize(
    ("content", "code", "value"),
    [
        ("", "unsupported", "0 lines"),
        ("word,kind\na,b\nc,d\n", "unsupported", "(1, 2, 3)"),
        ("temple/01.jpg 1\na,b\nc,d\n", "unsupported", "1 line"),
        ("none/a.jpg 0\nnone/b.jpg 0\n", "not-found", "'none/a.jpg'"),
    ],
)
def test_other_csv_files_raise(tree, content, code, value):
    (tree / "images" / "a.csv").write_text(content)
    with user_error(code, tree / "images" / "a.csv", value):
        open_images(tree / "images" / "a.csv")


def test_a_pipe_is_one_unreadable_image(tree):
    os.mkfifo(tree / "images" / "pipe.jpg")
    source = open_images(write(tree / "images" / "a.csv", *LINES, "pipe.jpg 1"))
    with pytest.raises(OSError, match="Not a regular file"):
        source[3]
    facts = inspect(str(tree / "images" / "a.csv"))["splits"]["train"]
    assert facts["unreadable"] == [{"name": "pipe.jpg", "reason": "Not a regular file"}]


def test_a_missing_image_is_one_unreadable_image(tree):
    source = open_images(write(tree / "images" / "a.csv", *LINES))
    before = source.fingerprint()
    (tree / "images" / "flower" / "00.png").unlink()
    with pytest.raises(OSError, match=r"flower/00\.png"):
        source[1]
    assert source.fingerprint() != before
    with user_error("not-found", "1 of 3 images", "flower/00.png"):
        source.stored_bytes()


@pytest.mark.parametrize(
    ("text", "found", "malformed"),
    [
        ('path\tcaption\na.jpg\tone\nb.jpg\t"two\nc.jpg\tthree\nd.jpg\tfour"\ne.jpg\tfive\n',
         "abcde", []),
        ('path,label\na.jpg,0\n"b.jpg,1\nc.jpg,0\nd.jpg,1', "acd", [3]),
        ('path,caption\na.jpg,"one\nmore\n\nline"\nb.jpg,two\n', "ab", []),
        ('path,label\n\n"a,x.jpg",0\nb.jpg,1\n', ["a,x", "b"], []),
    ],
    ids=["a quote in each of two captions", "no end", "a text over lines", "a blank line before"],
)  # fmt: skip
def test_a_quote_swallows_no_image(tmp_path, text, found, malformed):
    table = tmp_path / ("t.tsv" if "\t" in text else "t.csv")
    table.write_text(text)
    listing = read_listing(table)
    assert [image.path for image in listing.images] == [f"{name}.jpg" for name in found]
    assert listing.malformed == malformed


def test_a_json_list_on_one_long_line_is_read_whole(tmp_path):
    images = [{"path": f"img{i:05d}.jpg", "label": i % 3} for i in range(300)]
    (tmp_path / "l.json").write_text(json.dumps(images))
    for limit in (None, 64):
        listing = read_listing(tmp_path / "l.json", limit)
        assert len(listing.images) == 300
        assert listing.malformed == []


def test_lines_that_begin_with_a_bracket_are_no_json(tmp_path):
    (tmp_path / "l.txt").write_text("[x] a.jpg 0\n[x] b.jpg 1\n")
    listing = read_listing(tmp_path / "l.txt")
    assert [(image.path, image.label) for image in listing.images] == [
        ("[x] a.jpg", 0),
        ("[x] b.jpg", 1),
    ]
