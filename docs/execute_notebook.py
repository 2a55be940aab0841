"""Execute a notebook and store its outputs: python docs/execute_notebook.py NOTEBOOK FOLDER.

FOLDER is the working directory, with the data that the notebook names. Pictures are stored as JPEG,
and printed lines as plain text without progress bars, warnings and home folders.
"""

import base64
import io
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image


def jpeg(png: str) -> str:
    """Convert a picture; both are in base64."""
    small = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.save(small, "JPEG", quality=60)
    return base64.b64encode(small.getvalue()).decode()


def tidy(outputs: list[Any]) -> list[Any]:
    """Return the printed text as one output, followed by the pictures."""
    text, pictures = "", []
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            data["image/jpeg"] = jpeg(data.pop("image/png"))
            pictures.append(output)
        elif output.output_type == "stream" and output.name == "stdout":
            text += output.text
        elif "text/html" in data:  # a message; a progress bar is plain text alone
            text += data["text/plain"].rstrip() + "\n"
    text = text.replace(str(Path.home()), "~")
    printed = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    return [*printed, *pictures]


def main() -> None:
    path, folder = Path(sys.argv[1]), sys.argv[2]
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": folder}}
    client = NotebookClient(notebook, timeout=3600, record_timing=False, resources=resources)
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
