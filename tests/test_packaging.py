"""The wheel, built from the sdist, holds all that the package reads and runs without the tree."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_is_complete_and_runs_without_the_source_tree(tmp_path, flat):
    pytest.importorskip("build")
    pytest.importorskip("twine")
    source = tmp_path / "source"
    kept = ("src", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md")
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    shutil.rmtree(source / "src" / "localagg.egg-info", ignore_errors=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", str(tmp_path)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        (metadata,) = [name for name in files if name.endswith("/METADATA")]
        described = email.message_from_bytes(archive.read(metadata))
        archive.extractall(tmp_path / "installed")
    package = ROOT / "src" / "localagg"
    expected = {
        f"localagg/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in files if name.startswith("localagg/")} == expected
    assert {"localagg/py.typed", "localagg/report/page.css"} <= files
    assert {"timm", "docs", "onnx"} <= set(described.get_all("Provides-Extra", []))
    program = "import localagg, sys; from localagg import cli; print(localagg.__file__)\n"
    program += "train = 'pretrain folder --out run --epochs 2 --ir-epochs 1 --model resnet18_small"
    program += " --width 4 --blocks 1 --image-size 16 --workers 0 --device cpu --data'.split()\n"
    program += f"commands = [['recipes'], [*train, {str(flat)!r}], ['report', 'run']]\n"
    program += "sys.exit(max(cli.main(words) for words in commands))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path / "installed"))
    assert "folder" in ran.stdout
    assert (tmp_path / "run" / "report.html").exists()
