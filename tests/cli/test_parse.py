"""Words of a command line to options."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from expect import user_error

from localagg.cli.commands import COMMANDS
from localagg.cli.parse import internal, parse, positional
from localagg.config import PretrainConfig, override


@dataclass(frozen=True)
class Options:
    """An example."""

    run: str = positional("RUN")
    """Run folder."""
    files: tuple[str, ...] = positional("FILE", default=())
    """Any files."""
    options: PretrainConfig = field(default_factory=PretrainConfig)
    dry_run: bool = False
    """No training, 100 %."""
    few: tuple[float, ...] = ()
    """Shares."""
    mode: Literal["fast", "exact"] = "exact"
    """Speed
    or exactness."""
    level: Literal[1, 2] = 1
    """A level."""
    typed: frozenset[str] = internal(frozenset())
    words: tuple[str, ...] = internal(())

    @staticmethod
    def base(values):
        return override(PretrainConfig(epochs=7, learning_rate=0.5), clusters=(4, 5))


def read(line: str) -> Options:
    return parse(Options, "example", line.split())[0]


def test_typed_options_override_the_base_configuration():
    found = read("r --epochs 3 --flip 0.25 --clusters 8 9 --jitter 0 0 0 0 --no-compile")
    assert (found.run, found.options.epochs, found.options.learning_rate) == ("r", 3, 0.5)
    assert (found.options.views.flip, found.options.objective.clusters) == (0.25, (8, 9))
    assert found.options.views.jitter == (0, 0, 0, 0)
    assert found.typed == {"epochs", "flip", "clusters", "jitter", "compile"}
    assert found.words[:2] == ("r", "--epochs")
    assert read("r").typed == set()


def test_values_are_converted_to_the_types_of_the_fields():
    found = read("r a b --dry-run --few 0.5 1 --mode fast --level 2 --image-size=20")
    assert (found.files, found.dry_run, found.few) == (("a", "b"), True, (0.5, 1.0))
    assert (found.mode, found.level, found.options.views.image_size) == ("fast", 2, 20)
    assert not read("r --no_dry_run").dry_run


def test_every_command_has_the_option_json():
    assert parse(Options, "example", ["r", "--json", "f"])[1] == "f"


def test_none_returns_an_option_to_its_derived_default():
    found = read("r --epochs None --clusters None")
    assert found.options.epochs is None
    assert found.options.objective.clusters is None


def test_the_home_folder_is_expanded_where_no_shell_does(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["~/t.parquet", "--out=~/x.csv", "--json=~/x.json"]
    options, json = parse(COMMANDS["clusters"][0], "clusters", words)
    assert (options.source, options.out) == (f"{tmp_path}/t.parquet", f"{tmp_path}/x.csv")
    assert json == f"{tmp_path}/x.json"
    options, _ = parse(COMMANDS["search"][0], "search", ["~/t.parquet", "~/a.jpg", "~b.jpg"])
    assert options.images == (f"{tmp_path}/a.jpg", "~b.jpg")


def test_positional_arguments_may_stand_between_options():
    assert read("--level 2 r --dry-run a --mode fast b").files == ("a", "b")


@pytest.mark.parametrize(
    ("line", "code", "values"),
    [
        ("r --epochz 3", "option-unknown", ["'--epochz'", "Did you mean '--epochs'"]),
        ("r --epochz=3", "option-unknown", ["'--epochz'", "Did you mean '--epochs'"]),
        ("r --epoch 3", "option-unknown", ["'--epoch'"]),
        ("r -x", "option-unknown", ["'-x'"]),
        ("", "option-missing", ["RUN"]),
        ("r --epochs many", "option-invalid", ["--epochs", "'many'"]),
        ("r --epochs 1.5", "option-invalid", ["--epochs", "'1.5'"]),
        ("r --epochs -1", "option-invalid", ["--epochs is -1"]),
        ("r --epochs", "option-invalid", ["--epochs"]),
        ("r --crop-area 0.1", "option-invalid", ["--crop-area"]),
        ("r --mode slow", "option-invalid", ["--mode", "'slow'", "'exact'"]),
        ("r --level 3", "option-invalid", ["--level", "3"]),
    ],
)
def test_invalid_words_are_named_in_one_sentence(line, code, values):
    with user_error(code, *values) as caught:
        read(line)
    assert "\n" not in str(caught.value)


def test_help_shows_groups_plain_types_and_the_values_of_the_base(capsys):
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    titles = [line for line in shown.splitlines() if line.endswith(":") and line[0] != " "]
    groups = ["training", "network", "views", "neighbors and clusters", "pretrained networks"]
    assert titles[2:] == [f"{group}:" for group in groups]
    plain = " ".join(shown.split())
    assert "usage: localagg example [OPTIONS] RUN FILE" in plain
    assert "--learning-rate FLOAT" in plain
    assert "[0.5]" in plain
    assert "--clusters [INT ...]" in plain
    assert "[4 5]" in plain
    assert "No training, 100 %." in plain
    assert "--mode {fast,exact} Speed or exactness. [exact]" in plain
    assert "None" not in plain.replace("None restores", "")


@pytest.mark.parametrize("command", [*COMMANDS, "pretrain digits", "pretrain res18_LA"])
def test_each_command_explains_itself(command, capsys):
    name, *words = command.split()
    with pytest.raises(SystemExit):
        parse(COMMANDS[name][0], name, [*words, "-h"])
    assert "--json FILE" in capsys.readouterr().out


@pytest.mark.parametrize(("word", "value"), [("reference", "reference"), ("None", None)])
def test_a_choice_that_may_be_none_takes_its_values_and_none(word, value):
    options, _ = parse(COMMANDS["transfer"][0], "transfer", ["run", "--compat", word])
    assert options.options.compat == value


def test_none_among_other_values_of_a_list_is_refused():
    with user_error("option-invalid", "--clusters: None stands alone"):
        read("r --clusters None 3")
