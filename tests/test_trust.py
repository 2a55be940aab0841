"""Files from outside do no harm: each is rejected, or read as data (see SECURITY.md)."""

import ast
import html
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from expect import user_error
from PIL import Image, ImageFile
from safetensors.torch import save_file
from torch.distributed import TCPStore

import localagg
from localagg import checkpoint
from localagg.bank import MemoryBank
from localagg.cli.main import main
from localagg.config import PretrainConfig
from localagg.data import open_images
from localagg.data.images.decode import UnreadableImage, decode, decode_crops, decoded_size
from localagg.distributed.launcher import loopback_store
from localagg.errors import UserError
from localagg.io.metrics_log import read_metrics
from localagg.models import create_encoder
from localagg.report.charts import learning_curves
from localagg.report.embedding_page import Pictured, write_embedding_page
from localagg.report.page import page_script, table
from localagg.report.thumbnails import SourceImages

SRC = Path(localagg.__file__).parent


# --- Nothing is unpickled -------------------------------------------------------------------------


class Trap:
    """Make a folder where somebody unpickles this."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.fixture
def trap(tmp_path):
    yield Trap(tmp_path / "sprung")
    assert not (tmp_path / "sprung").exists()


def test_the_trap_springs_where_one_unpickles(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("optimizer.pt", kind) for kind in ("zip", "legacy", "plain pickle")),
        ("model.safetensors", "zip"),
        ("bank-0-of-1.safetensors", "zip"),
    ],
)
def test_a_pickle_in_a_checkpoint_is_damage(tmp_path, trap, name, kind):
    encoder = create_encoder("resnet18_small", dim=8, width=4, blocks=(1,), seed=0)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    parts = {"encoder": encoder, "optimizer": optimizer, "bank": MemoryBank(10, 8)}
    checkpoint.begin_run(tmp_path / "run", PretrainConfig(), {"data": "digits"})
    folder = checkpoint.save(tmp_path / "run", 1, **parts, clusters={}, progress={})
    if kind == "plain pickle":
        (folder / name).write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, folder / name, _use_new_zipfile_serialization=kind == "zip")
    with user_error("damaged", folder):
        checkpoint.restore(folder, **parts)


def test_a_pickle_as_weights_is_damage(tmp_path, trap, capsys):
    for name in ("weights.safetensors", "checkpoint.pth.tar"):
        torch.save({"state_dict": trap}, tmp_path / name)
    with user_error("unsupported", "weights.safetensors"):
        checkpoint.load_encoder(tmp_path / "weights.safetensors")
    words = ["import-tf", str(tmp_path / "checkpoint.pth.tar"), "--model", "preact_resnet18"]
    assert main([*words, "--out", str(tmp_path / "out.safetensors")]) == 2
    assert "checkpoint.pth.tar" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir"])
def test_weights_cannot_name_other_weights(tmp_path, trap, option):
    """timm would unpickle or download the file."""
    torch.save({"state_dict": trap}, tmp_path / "other.pth")
    spec = {"model": "timm:resnet18", "dim": 8, option: str(tmp_path / "other.pth")}
    weights = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, weights, metadata={"localagg": json.dumps(spec)})
    with user_error("unsafe", option):
        checkpoint.load_encoder(weights)


def calls(path):
    """Yield (dotted name, keywords) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_no_call_can_unpickle_unpack_or_listen():
    forbidden = (
        *("pickle.load", "pickle.loads", "eval", "exec", "os.system", "yaml.load"),
        *(".extractall", ".extract", ".unpack_archive", ".bind", ".serve_forever", ".run_server"),
        ".listen",
    )
    loads = 0
    for path in SRC.rglob("*.py"):
        for name, keywords in calls(path):
            where = f"{name} in {path.name}"
            if path == SRC / "report/explorer/server.py" and name in (
                "listener.bind",
                "listener.listen",
            ):
                continue  # tests/report has it on loopback alone
            assert not any(
                name == bad or (bad[0] == "." and name.endswith(bad)) for bad in forbidden
            )
            if name == "torch.load":
                loads += 1
                assert keywords.get("weights_only") == "True", where
            if name == "TCPStore":  # torch's own listens to every network
                assert keywords["is_master"] == "host" or "master_listen_fd" in keywords, where
            assert keywords.get("allow_pickle", "False") == "False", where
            assert keywords.get("shell", "False") == "False", where
            assert keywords.get("trust_remote_code", "False") == "False", where
        text = path.read_text()
        assert not any(name in text for name in ("http.server", "socketserver", "0.0.0.0"))
    assert loads >= 3  # the walk sees them


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_store_of_several_processes_listens_on_loopback_alone():
    store = loopback_store()
    tables = [Path("/proc/net") / name for name in ("tcp", "tcp6")]
    lines = [line.split() for path in tables if path.exists() for line in path.open()]
    listening = {line[1] for line in lines if line[3] == "0A"}  # "address:port" in hexadecimals
    port = f"{store.port:04X}"
    assert {each for each in listening if each.endswith(f":{port}")} == {f"0100007F:{port}"}
    client = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    client.set("a", "b")
    assert store.get("a") == b"b"


# --- Nothing leaves its root ----------------------------------------------------------------------


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((16, 16), 50).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def add_member(tar, name, data=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def outside(tmp_path):
    """Return tmp_path/inside; afterwards nothing beside it was created or removed."""
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    yield tmp_path / "inside"
    assert {path.name for path in tmp_path.iterdir()} == {"inside", "secret.jpg"}


HOSTILE = ["../evil.jpg", "/../../evil.jpg", "a/../../../evil.jpg", "C:\\evil.jpg"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_a_tar_of_images_do_not_lead_out(outside, name):
    folder = outside / "data"
    folder.mkdir()
    with tarfile.open(folder / "train-000.tar", "w") as tar:
        add_member(tar, name, jpeg())
        add_member(tar, "b.jpg", jpeg())
        add_member(tar, "link1.jpg", type=tarfile.SYMTYPE, linkname="../../secret.jpg")
        add_member(tar, "link2.jpg", type=tarfile.LNKTYPE, linkname="b.jpg")
    source = open_images(folder)
    assert len(source) == 2  # links are skipped
    assert all(decode(source[i].image).shape == (3, 16, 16) for i in range(2))
    assert main(["pack", str(folder), str(outside / "packed")]) == 0
    assert main(["pack", str(folder), str(outside / "tars"), "--format", "webdataset"]) in (0, 2)
    names = {path.relative_to(outside).parts[0] for path in outside.rglob("*")}
    assert names <= {"data", "packed", "tars"}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_a_tar_of_weights_do_not_lead_out(outside, name, capsys):
    with tarfile.open(outside / "weights.tar", "w") as tar:
        for suffix in (".index", ".data-00000-of-00001"):
            add_member(tar, name.replace(".jpg", suffix), b"evil")
    words = ["import-tf", str(outside / "weights.tar"), "--model", "preact_resnet18"]
    assert main([*words, "--out", str(outside / "w.safetensors")]) == 2
    assert "weights.tar" in capsys.readouterr().err
    assert [path.name for path in outside.rglob("*")] == ["weights.tar"]


@pytest.mark.parametrize("line", ["../secret.jpg 0", "a/../../secret.jpg 0", "/../secret.jpg 0"])
def test_lines_of_a_listing_do_not_lead_out(outside, line):
    (outside / "a.jpg").write_bytes(jpeg())
    (outside / "train_x.csv").write_text(f"a.jpg 0\n{line}\n")
    with pytest.raises(UserError, match=r"Line 2 of .*train_x\.csv"):
        open_images(str(outside / "train_x.csv"))


# --- Image bombs ----------------------------------------------------------------------------------


def png(side: int) -> bytes:
    """Return a PNG of ``side`` x ``side`` black pixels that stores only some rows."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes((1 + 3 * side) * min(side, 20)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, data) for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )


def test_a_bomb_is_rejected_by_its_header(tmp_path, monkeypatch, capsys):
    bomb = png(60_000)
    assert len(bomb) < 20_000  # of 10.8 GB

    def load(*_):
        raise AssertionError("decoded")

    assert decode(png(20)).shape == (3, 20, 20)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(UnreadableImage, match="decoded"):  # the patch is in decode's way
        decode(png(20))
    for read in (decode, decoded_size, crops):
        with pytest.raises(UnreadableImage, match="pixels"):
            read(bomb)
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert main(["inspect", str(tmp_path), "--workers", "0"]) == 0
    assert "bomb.png" in capsys.readouterr().out


def crops(data):
    return decode_crops(data, [(0, 0, 8, 8)], 8, resize="bilinear")


# --- Names are escaped ----------------------------------------------------------------------------

NAME = "<img src=x onerror=alert(1)>"
QUOTED = "\"'><script>alert(1)<"  # a class folder; a file name cannot hold a slash


class Tags(HTMLParser):
    """Collect the elements of a page with their attributes, its scripts, and its text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.script, self.text, self._inside = [], "", "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag == "script"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.script += data
        else:
            self.text += data


def test_names_of_files_classes_and_runs_are_text_in_every_page(tmp_path):
    data = tmp_path / "data"
    for folder in (NAME, QUOTED):
        (data / folder).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(data / folder / f"{NAME}{i}.jpg")
    source = open_images(data)
    rows = F.normalize(torch.rand(6, 4), dim=1)
    line = {"step": 1, "epoch": 1, "loss": 1.0, "spread": 0.1, "effective_rank": 2.0}
    names = [source.name(i) for i in range(6)]
    write_embedding_page(
        tmp_path / "page.html",
        Pictured(rows, names, {QUOTED: [NAME, QUOTED] * 3}, SourceImages(source, range(6))),
        title=NAME,
        head=table(["", NAME], [[QUOTED, NAME]]),
        foot=learning_curves({NAME: [line | {"warnings": [NAME]}], QUOTED: [line]}),
    )
    tags = Tags((tmp_path / "page.html").read_text())
    assert not any("onerror" in attributes for _, attributes in tags.elements)
    plain = {"html", "head", "meta", "title", "style", "script", "body", "header", "nav", "main"}
    plain |= {"h1", "p", "div", "noscript", "table", "tr", "th", "td", "ul", "li", "bdi", "svg"}
    plain |= {"path", "text", "figure", "figcaption"}
    assert {tag for tag, _ in tags.elements} <= plain
    policy = next(attributes for tag, attributes in tags.elements if "content" in attributes)
    assert "default-src 'none'" in policy["content"]
    scripts = [attributes for tag, attributes in tags.elements if tag == "script"]
    assert [s["type"] for s in scripts if s["type"] != "text/plain"] == ["module"]
    assert not any("src" in script for script in scripts)
    assert NAME in tags.text
    data = tags.script.replace(page_script(), "")
    assert "<" not in data
    assert html.escape(NAME) not in data
    assert json.dumps(NAME).replace("<", r"\u003c")[1:-1] in data


def test_hostile_names_go_through_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / "data" / "[red]<b>"
    folder.mkdir(parents=True)
    (folder / f"{NAME}[bold].jpg").write_bytes(b"no image")
    for i in range(4):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{NAME}{i}.jpg")
    assert main(["inspect", str(tmp_path / "data"), "--workers", "0"]) == 0
    assert f"[red]<b>/{NAME}[bold].jpg" in capsys.readouterr().out


def test_a_run_folder_names_nothing_outside(tmp_path):
    """Lines of metrics are read as JSON."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "__class__": "os.system"}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "__class__": "os.system"}]
