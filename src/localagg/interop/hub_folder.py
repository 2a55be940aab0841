"""The model card of an exported folder, and its upload to the Hugging Face Hub."""

import json
from pathlib import Path
from typing import Any

from ..checkpoint import EXPORTED_NAME, read_run
from ..errors import UserError, first_line
from ..models import Encoder

_SILENT_SECONDS = 120  # of the Hub, after which an upload ends

_CARD = """---
library_name: localagg
pipeline_tag: image-feature-extraction
license: {license}
tags: [localagg, local-aggregation, self-supervised]
---

# {name}

Image embeddings of {dim} dimensions, learned without labels by
[Local Aggregation](https://arxiv.org/abs/1903.12355) with localagg.

```python
import localagg

model = localagg.load("FOLDER or USER/NAME")  # reads {file}
rows = model.embed(["image.jpg"])  # float32 [1, {dim}], unit length
```
{timm}
## Data

{data}

## Training

{training}

## Measurements

{measurements}
"""
_TIMM = """
The backbone without the embedding head, for timm:

```python
import timm

features = timm.create_model("local-dir:FOLDER", pretrained=True)  # or hf-hub:USER/NAME
```
"""
_FILL_IN = "other # FILL IN: license of the weights, given that of the images"


def write_model_card(run: Path, encoder: Encoder, folder: Path) -> None:
    """Write ``README.md`` into an exported folder.

    Args:
        run: run folder, or a weights file, of which nothing but the network is known.
        encoder: its network.
        folder: the exported folder.
    """
    data = "FILL IN: the training images are unknown, as weights alone were exported."
    training = "FILL IN."
    if run.is_dir():
        config, facts = read_run(run)
        data = (
            f"{facts['size']:,} images: `{Path(facts['data']).name}`. FILL IN: where they are from."
        )
        model, objective = encoder.spec["model"], config.objective
        training = (
            f"`{model}`, {config.ir_epochs} epochs of Instance Recognition, then Local Aggregation"
            f" up to epoch {config.epochs}; batch {config.batch_size}, {objective.neighbors}"
            f" background neighbors, clusters {list(objective.clusters or ())}, views of"
            f" {config.views.image_size} pixels, seed {config.seed}."
        )
    text = _CARD.format(
        license=_FILL_IN,
        name=run.stem,
        dim=encoder.spec["dim"],
        file=EXPORTED_NAME,
        timm=_TIMM if (folder / "config.json").exists() else "",
        data=data,
        training=training,
        measurements=_measurements(run),
    )
    (folder / "README.md").write_text(text)


def _measurements(run: Path) -> str:
    """Return a table of the results of a run, or that there are none."""
    file = run / "results.json"
    try:
        entries: list[dict[str, Any]] = json.loads(file.read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError):
        entries = []
    rows = [
        f"| {entry['measure']} | {name} | {value:.4g} | {entry.get('asked', '')} |"
        for entry in entries
        for name, value in entry["values"].items()
    ]
    if not rows:
        return "None yet: measure by `localagg knn`, with floors, before you publish."
    return "\n".join(["| measure | value | | images |", "| --- | --- | --- | --- |", *rows])


def check_hub_name(name: str) -> None:
    """Raise UserError unless a name may be one of a repository on the Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError("option-invalid", f"--push {name} must be USER/NAME.") from None


def push_to_hub(folder: Path, name: str) -> str:
    """Upload an exported folder; return its address.

    Raises:
        UserError: no network, no token, or no right to write there. The folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import get_session

    try:
        session: Any = get_session()
        session.timeout = _SILENT_SECONDS  # by default it waits forever; before 1.0 it still does
        api = HfApi()
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # whatever its client raises: the folder must be named
        raise UserError(
            "environment",
            f"'{folder}' is written, but was not uploaded to '{name}' ({first_line(error)}); log in"
            f" by hf auth login, then hf upload {name} {folder}.",
        ) from None
    return str(address)
