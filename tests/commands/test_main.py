"""The command line: what it imports, what it says of wrong words, how it names itself, what --quiet leaves."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import attack
from lightning_advknn import __version__, command_line, configurations
from lightning_advknn.commands import COMMANDS, jobs
from lightning_advknn.commands.main import main
from lightning_advknn.commands.options import parse
from lightning_advknn.configurations import ConfigFile, find, name_of
from lightning_advknn.ranks import Ranks

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "pytorch_lightning",
    "torchvision",
    "matplotlib",
    "sklearn",
    "scipy",
    "numpy",
    "wandb",
    "rich",
)
EXPECTED = "Expected one of the commands evaluate, leaderboard, reproduce, train, sweep, but got"


def error(capsys: pytest.CaptureFixture[str], call: Callable[[], object]) -> str:
    """What is said before an end with exit code 2."""
    with pytest.raises(SystemExit) as leaving:
        call()
    assert leaving.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS if name != "train")]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: sys.stderr.write('loaded ' + ' '.join({{*{HEAVY}}} & {{*sys.modules}})))\n"
        "from lightning_advknn.__main__ import main\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stderr == "loaded "
    assert len(done.stdout) > 10


def test_help_describes_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for name, does in COMMANDS.items():
        assert f"{name} {does}" in words
    for name, does in COMMANDS.items():
        if name != "train":  # LightningCLI's own, which takes seconds
            with pytest.raises(SystemExit, match="0"):
                main([name, "--help"])
            assert does in " ".join(capsys.readouterr().out.split())


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lightning-advknn {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["evalute"], f"{EXPECTED} 'evalute'. Did you mean `evaluate`?\n"),
        (["predict"], f"{EXPECTED} 'predict'.\n"),
    ],
)
def test_an_unknown_command(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert f"lightning-advknn: error: {message}" in error(capsys, lambda: main(arguments))


def test_attack_py_has_three_commands(capsys: pytest.CaptureFixture[str]) -> None:
    expected = (
        "attack.py: error: Expected one of the commands evaluate, leaderboard, reproduce, but got 'train'."
    )
    assert error(capsys, lambda: attack.main(["train", "fit"])).endswith(f"{expected}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--victm.k=5"], "unrecognized arguments: --victm.k=5. Did you mean `--victim.k`?"),
        (["--dvice=cpu"], "Did you mean `--device`?"),
        (["--colour=red"], "unrecognized arguments: --colour=red\n"),
        (["--attacks.fgsm.functoin=fgsm"], "'functoin' is not accepted. Did you mean `function`?"),
        (["--config=digits/atack"], "Did you mean `digits/attack`?"),
        (["--backbone.config=digits/backbon"], "Did you mean `digits/backbone`?"),
    ],
)
def test_an_unknown_option_or_configuration(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    arguments = ["evaluate", "--config=digits/attack", *options]
    assert message in error(capsys, lambda: main(arguments))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"victim": {"kk": 5}}, "'victim' does not accept option 'kk'. Did you mean `victim.k`?"),
        ({"imags": 5}, "Option 'imags' is not accepted. Did you mean `images`?"),
        ({"attacks": {"a": {"functon": "fgsm"}}}, "Did you mean `function`?"),
        ({"surrogates": {"a": {"confg": "x"}}}, "Did you mean `config`?"),
    ],
)
def test_an_unknown_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, Any], message: str
) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(yaml.safe_dump(content))
    said = error(capsys, lambda: main(["evaluate", "--config=digits/attack", f"--config={config}"]))
    assert message in said
    assert said.count("Did you mean") == 1


def test_an_unknown_attack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--attacks.fgsm.function=fgsn", f"--output={tmp_path}", f"--cache={tmp_path}"]
    assert main(["evaluate", "--config=digits/attack", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lightning-advknn: error: Expected `function` to be one of")
    assert said.endswith("but got 'fgsn'. Did you mean `fgsm`?\n")


def test_unknown_words_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["fi"], "Did you mean `fit`?"),
        (
            ["fit", "--config=digits/backbone", "--trainer.max_epohs=1"],
            "Did you mean `--trainer.max_epochs`?",
        ),
        (["fit", "--config=digits/backbne"], "Did you mean `digits/backbone`?"),
        (
            ["fit", "--config=digits/backbone", "--model.init_args.learning_rat=1"],
            "Did you mean `learning_rate`?",
        ),
    ):
        said = error(capsys, lambda arguments=arguments: main(["train", *arguments]))
        assert message in said


def test_training_that_cannot_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "fit", "--config=digits/surrogate", "--trainer.logger=false"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lightning-advknn train: error: ")
    assert "path/to/backbone/best.ckpt" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["/home/me/bin/lightning-advknn", "evaluate", "--config", "a b"],
            "lightning-advknn evaluate --config 'a b'",
        ),
        (["/home/me/lightning_advknn/__main__.py", "evaluate"], "lightning-advknn evaluate"),
        (["attack.py", "evaluate"], "python attack.py evaluate"),
        (["/home/me/attack.py", "evaluate"], "python attack.py evaluate"),
    ],
)
def test_how_it_was_called_names_no_folder_of_the_program(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], words: str
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line.command() == words


def test_configurations_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ships = ROOT / "configs" / "digits" / "attack.yaml"
    for name in (
        "digits/attack",
        "digits/attack.yaml",
        "configs/digits/attack",
        "configs/digits/attack.yaml",
    ):
        assert find(name) == ships
    assert name_of(str(ships)) == "digits/attack"
    own = Path("configs", "digits", "attack.yaml")  # nearer than the one that ships
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert find("digits/attack") == own
    nearest = Path("digits", "attack.yaml")
    nearest.parent.mkdir()
    nearest.write_text("{}")
    assert find("digits/attack") == nearest
    assert name_of(str(nearest.absolute())) == "digits/attack.yaml"
    assert ConfigFile("digits/backbone").absolute == str(ships.with_name("backbone.yaml"))
    with pytest.raises(TypeError, match=f"there is no file digits, and none .* {configurations.SHIPPED}"):
        find("digits")  # a folder


def test_a_configuration_names_others_beside_it_or_that_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ships = ROOT / "configs" / "digits"
    Path("own").mkdir()
    Path("own", "mine.yaml").write_text((ships / "backbone.yaml").read_text())
    config = yaml.safe_load((ships / "attack.yaml").read_text())
    config["backbone"]["config"] = "mine"
    config["surrogates"] = {"dknnb": {"config": "digits/surrogate"}}
    Path("own", "attack.yaml").write_text(yaml.safe_dump(config))
    options = parse("evaluate", ["--config=own/attack"], "")
    assert options.backbone.config.absolute == str(tmp_path / "own" / "mine.yaml")
    assert options.surrogates["dknnb"].config.absolute == str(ships / "surrogate.yaml")
    assert (options.output, options.cache) == ("runs/digits", "runs/cache")


class Terminal:
    """A stream that is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_failed_checks_are_last_and_quiet_shows_no_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool, strict: bool
) -> None:
    seen = []

    def work(*_: object, quiet: bool) -> list[str]:
        seen.append((quiet, sys.stderr.isatty()))
        sys.stdout.write("Results are in runs/digits\n")
        sys.stderr.write("a warning\n")
        return ["a check does not hold"]

    errors = Terminal()
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(jobs, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(jobs, "evaluate", work)
    monkeypatch.setattr(jobs, "record_experiment", lambda *_: nullcontext())
    options = ["--quiet"] * quiet + ["--strict"] * strict
    assert main(["evaluate", "--config=digits/attack", *options]) == (3 if strict else 0)
    assert capsys.readouterr().out == "Results are in runs/digits\na check does not hold\n"
    assert seen == [(quiet, not quiet)]  # progress bars are shown on terminals only
    assert errors.text == "a warning\n"


def test_a_quiet_dry_run_still_shows_the_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["reproduce", "--config=digits/reproduce", "--dry-run", "--quiet", "--only=digits/tables"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[::2]] == [["to", "do", f"digits/tables/seed{n}"] for n in range(3)]
    for line in lines[1::2]:
        assert line.split()[:3] == ["lightning-advknn", "evaluate", "--config=digits/attack"]


def test_a_gpu_that_is_too_small_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> list[str]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 21 GiB.")

    monkeypatch.setattr(jobs, "_evaluate", lambda options, ranks: work)
    assert jobs._run("evaluate", None, Ranks(), "attack.py") == 1
    said = capsys.readouterr().err
    assert said.startswith("attack.py: error: the GPU's memory is full: CUDA out of memory. Tried")
    assert "Lower `--victim.memory_gib`" in said
