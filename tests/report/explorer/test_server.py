"""The explorer's server: what it answers, and what it refuses."""

import asyncio
import errno
import io
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from expect import user_error
from explorer_space import COUNT, make_space, png
from PIL import Image

from embeddings import blobs
from localagg.report.explorer import server

testclient = pytest.importorskip("starlette.testclient", reason="starlette is not installed")
HOST, TOKEN = "127.0.0.1:4321", "secret"


@pytest.fixture
def client(tmp_path):
    app = server.make_app(make_space(tmp_path), TOKEN, HOST, title="<b>t")
    return testclient.TestClient(app, base_url=f"http://{HOST}/{TOKEN}")


def test_the_page_names_its_policy_and_escapes_its_title(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert "&lt;b&gt;t" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_arrays_are_binary_and_columns_may_be_called_as_ours(client):
    columns = client.get("/data").json()["columns"]
    assert [column["name"] for column in columns] == ["label", "xy", "typed label"]
    assert np.frombuffer(client.get("/array/xy").content, "<u2").shape == (2 * COUNT,)
    codes = np.frombuffer(client.get(f"/array/{columns[0]['array']}").content, "<u2")
    assert [columns[0]["names"][code] for code in codes] == ["x", "y"] * 20


def test_neighbors_are_those_of_a_naive_search(client):
    rows = blobs([10, 10, 10, 10]).astype(np.float64)
    cosine = rows @ rows[7]
    cosine[7] = -2
    best = np.argsort(-cosine)[:12]
    near = client.get("/details/7").json()["neighbors"]
    assert [i for i, _ in near] == best.tolist()
    np.testing.assert_allclose([c for _, c in near], cosine[best], atol=1e-6)


def test_pictures_keep_their_shape(client):
    drawn = Image.open(io.BytesIO(client.get("/picture/20/96").content)).convert("RGB")
    assert drawn.size == (96, 48)
    assert abs(drawn.getpixel((40, 20))[0] - 100) < 4


def test_search_by_picture_and_by_text(client):
    assert client.post("/search", content=png(31)).json()[0][0] == 31
    assert client.get("/find", params={"text": "A/1"}).json() == [1, *range(10, 20)]
    assert client.get("/find", params={"text": "17"}).json() == [17]
    assert client.post("/paths", json=[5, 6]).json() == ["a/5.jpg", "a/6.jpg"]


def test_labels_are_saved_beside_and_read_again(client, tmp_path):
    assert client.post("/label", json={"ids": [4, 2], "label": 'a,"b'}).json()[1:] == ['a,"b']
    client.post("/label", json={"ids": [2], "label": "c"})
    file = tmp_path / "f.labels.csv"
    assert file.read_text().splitlines() == ["row,path,label", "2,a/2.jpg,c", '4,a/4.jpg,"a,""b"']
    names, codes = make_space(tmp_path).label_column()
    assert {i: names[c] for i, c in enumerate(codes) if c} == {2: "c", 4: 'a,"b'}
    client.post("/label", json={"ids": [2, 4], "label": ""})
    assert file.read_text() == "row,path,label\n" or file.read_bytes() == b"row,path,label\r\n"


def test_a_label_that_cannot_be_saved_is_refused_with_the_reason(client, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full", str(tmp_path / "f.labels.csv"))

    monkeypatch.setattr(os, "replace", full)
    answer = client.post("/label", json={"ids": [1], "label": "a"})
    assert answer.status_code == 409
    assert [text in answer.text for text in ("f.labels.csv", "No space left")] == [True] * 2


def test_labels_of_other_images_and_damaged_ones_are_refused(tmp_path):
    file = tmp_path / "f.labels.csv"
    file.write_text("row,path,label\n2,b/2.jpg,c\n")
    with user_error("mismatch", file, "b/2.jpg"):
        make_space(tmp_path)
    file.write_text("path\n2\n")
    with user_error("damaged", file):
        make_space(tmp_path)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:4321"},
        {"host": "127.0.0.1:80"},
        {"host": "127.0.0.1.evil.example:4321"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://127.0.0.1:4321"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_hosts_and_origins_are_refused(client, tmp_path, headers):
    for answer in (
        client.get("/data", headers=headers),
        client.get("/picture/1/96", headers=headers),
        client.post("/label", json={"ids": [1], "label": "x"}, headers=headers),
    ):
        assert answer.status_code == 403
        assert "jpg" not in answer.text
    assert not (tmp_path / "f.labels.csv").exists()


def test_our_own_origin_is_answered(client):
    own = {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"}
    assert client.post("/paths", json=[1], headers=own).status_code == 200
    local = {"host": "localhost:4321", "origin": "http://localhost:4321"}
    assert client.get("/data", headers=local).status_code == 200


@pytest.mark.parametrize("token", ["", "wrong", "Secret", "secre", "secret2", "secret%00"])
def test_a_wrong_token_finds_nothing(client, token):
    for place in ("", "data", "picture/1/96", "array/xy", "details/1"):
        answer = client.get(f"http://{HOST}/{token}/{place}", follow_redirects=False)
        assert answer.status_code in (404, 307), place
        assert "jpg" not in answer.text


@pytest.mark.parametrize(
    "place",
    [
        "../../etc/passwd",
        "picture/..%2f..%2fetc%2fpasswd/96",
        "picture/-1/96",
        f"picture/{COUNT}/96",
        "picture/3/96",  # damaged
        "picture/1/100000",
        f"picture/{10**30}/96",
        "array/..%2f..%2fpage.css",
        "array/f.labels.csv",
        "details/99",
        "f.labels.csv",
        "%2e%2e/%2e%2e/etc/passwd",
    ],
)
def test_nothing_else_is_served(client, place):
    assert client.get(f"http://{HOST}/{TOKEN}/{place}").status_code == 404


def test_bad_and_huge_pictures_are_refused(client, monkeypatch):
    bomb = (
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0"
    )
    for bad in (b"", b"GIF89a", b"<svg/>", png(1)[:60], bomb):
        answer = client.post("/search", content=bad)
        assert answer.status_code == 400
        assert answer.json()["error"]
    monkeypatch.setattr(server, "MOST_BYTES", 1 << 20)
    assert client.post("/search", content=bytes(2 << 20)).status_code == 413
    assert client.post("/paths", content=iter([bytes(1 << 19)] * 9)).status_code == 413


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1.5]", b"[true]", b"[-1]", b"[40]", b"{}", b"[[" * 9999]
)
def test_bad_requests_are_refused(client, body):
    assert client.post("/paths", content=body).status_code == 400
    assert client.post("/label", content=body).status_code == 400


@pytest.mark.parametrize("label", ["x" * 201, "a\nb", "\u202ex", 7])
def test_bad_labels_are_refused(client, tmp_path, label):
    assert client.post("/label", json={"ids": [1], "label": label}).status_code == 400
    assert not (tmp_path / "f.labels.csv").exists()


def test_mistakes_of_the_command(tmp_path, monkeypatch):
    with user_error("not-found", tmp_path / "none"):
        server.explore(tmp_path / "none")
    with user_error("option-invalid", 70000):
        server.explore(tmp_path, port=70000)
    with server._listen(0) as taken:
        port = taken.getsockname()[1]
        assert taken.getsockname()[0] == "127.0.0.1"
        with user_error("environment", port):
            server.explore(tmp_path, port=port)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with user_error("missing-extra", "uvicorn", "localagg[explore]"):
        server.explore(tmp_path)


def test_small_answers_are_not_held_back():
    """With Nagle's algorithm a client's delayed acknowledgment costs 40 ms an answer."""
    found = []

    async def serve_once():
        answered = asyncio.Event()

        async def answer(_, writer):
            connection = writer.get_extra_info("socket")
            found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()
            answered.set()

        with server._listen(0) as listener:
            async with await asyncio.start_server(answer, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                await answered.wait()
                writer.close()

    with ThreadPoolExecutor(1) as pool:  # browser tests before this one leave a loop in this thread
        pool.submit(asyncio.run, serve_once()).result()
    assert found[0]
