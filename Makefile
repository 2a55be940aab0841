.PHONY: demo test test-all coverage check docs lowest gpu

PYTHON ?= python3

# Installs once, and again when the dependencies change.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: .venv/installed
	.venv/bin/localagg demo

test: .venv/installed
	.venv/bin/python -m pytest -n auto --dist loadscope --no-loadscope-reorder -m "not slow"

test-all: .venv/installed
	.venv/bin/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

coverage: .venv/installed
	.venv/bin/python -m pytest -n auto --dist loadscope --no-loadscope-reorder --cov --cov-report=term

check: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/hadolint Dockerfile
	.venv/bin/pyright

# The tests but the slow ones, with the oldest dependencies that pyproject.toml allows.
lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/python -m uv pip install --quiet --python .venv-lowest --resolution lowest-direct --editable '.[test]'
	.venv-lowest/bin/python -m pytest -n auto --dist loadscope --no-loadscope-reorder -m "not slow"

docs: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[docs]'
	.venv/bin/python -m sphinx --fail-on-warning --keep-going -q docs docs/_build/html

# On a machine with a GPU, without a network: this Python and the packages that it has.
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py
