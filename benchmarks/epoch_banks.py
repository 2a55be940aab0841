"""The banks that k-means meets in a real run: one file at each clustering of LA, one at the end.

Goes on from a finished run of IR on the same images, for as many epochs of LA as are asked for. The
files are what ``clustering.py`` is measured on.
"""

import argparse
from pathlib import Path
from unittest import mock

from safetensors.torch import save_file

from localagg import checkpoint, pretrain
from localagg.config import override
from localagg.recipes.builtin import recipe
from localagg.training.learner import Learner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="a finished run of IR alone")
    parser.add_argument("--data", required=True, help="its images")
    parser.add_argument("--out", type=Path, required=True, help="folder for bank-0, bank-1, ...")
    parser.add_argument("--epochs", type=int, default=3, help="of LA")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    before, _ = checkpoint.read_run(options.start)
    end = (before.epochs or 0) + options.epochs
    config = override(recipe("cifar10").config, epochs=end, drops=(), eval_every=0)
    plain, written = Learner.recluster, []

    def keep(rows) -> None:
        save_file({"rows": rows.contiguous()}, options.out / f"bank-{len(written)}.safetensors")
        written.append(1)

    def recluster(self, *arguments, **named):
        keep(self.bank.rows)
        return plain(self, *arguments, **named)

    with mock.patch.object(Learner, "recluster", recluster):
        pretrain(config, options.data, options.out / "run", start=options.start)
    keep(checkpoint.load_bank(options.out / "run"))


if __name__ == "__main__":
    main()
