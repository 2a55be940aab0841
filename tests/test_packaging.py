"""The wheel holds everything that the package reads, and runs without the source tree."""

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
def test_a_wheel_is_complete_and_runs_without_the_source_tree(tmp_path):
    pytest.importorskip("build")
    source = tmp_path / "source"
    kept = ("src", "pyproject.toml", "README.md", "LICENSE")
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    shutil.rmtree(source / "src" / "localagg.egg-info", ignore_errors=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
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
    program += "sys.exit(cli.main(['recipes']))"
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
