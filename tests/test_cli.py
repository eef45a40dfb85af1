from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import nadhooks
from nadhooks import cli, demo
from nadhooks.cli import printing
from nadhooks.cli.printing import Update
from nadhooks.formats.writing import write_bytes
from nadhooks.masks import Masks
from nadhooks.progress import Progress, Report
from nadhooks.tasks import Tasks

from .hub import Hub
from .test_data import folders
from .test_masks import THREE

MODEL = "timm:resnet18,in_chans=1,num_classes=10,channels=(8,8,8,8)"
LEARN = ["learn", MODEL, "--image-size", "32", "--data", "digits", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NADHOOKS_CACHE", str(tmp_path / "cache"))


def run(*arguments: str) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learnt") / "m.safetensors"
    assert run(*LEARN, "--tasks", "3", "5", "-o", str(path), "--no-test", "--seed", "7") == 0
    return path


def test_learn_writes_masks_that_say_where_they_came_from(mask_file: Path) -> None:
    masks = nadhooks.load(mask_file)
    assert masks.labels == (3, 5)
    assert masks.provenance["model"] == MODEL
    assert masks.provenance["data"] == "digits"
    assert masks.provenance["seed"] == 7


def test_learn_shows_its_worth_and_warns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nadhooks.cli.learning.MANY", 100)
    few = ["--test-images", "6"]
    assert run(*LEARN, "--tasks", "1", "--method", "nad", "--epochs", "1", "--sites", "layer[12].*", *few) == 0
    shown, told = capsys.readouterr()
    assert "measuring will take 120 forward passes; --test-images N takes fewer" in told
    for word in ("recall", "AUC", "full", "sub-architecture", "random mask", "Recall alone proves nothing"):
        assert word in shown
    assert nadhooks.load("masks.safetensors").provenance["method"] == "nad"
    assert nadhooks.load("masks.safetensors").provenance["quality"]["images"] == 60


def test_warnings_of_the_library_are_lines_in_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--method", "activation", "--memory", "0", "--sites", "layer4.*", "--no-test"]
    assert run(*LEARN, *few) == 0
    told = capsys.readouterr().err
    words = "4 samples of each task are drawn from, not 32, for lack of memory; pass a larger --memory (0 bytes now)"
    assert [each for each in told.splitlines() if "samples" in each] == [f"nadhooks: warning: {words}"]
    assert "UserWarning" not in told
    shown: list[object] = []
    show = printing.showing(lambda *about: shown.append(about))
    show(UserWarning("theirs"), UserWarning, torch.__file__, 1)
    assert len(shown) == 1
    assert not capsys.readouterr().err


FAST = ["--sites", "layer[34].*", "--tasks", "3", "5", "--no-test", "--device", "cpu"]


def test_learn_is_told_how_much_to_keep_in_every_way_and_the_file_says_so() -> None:
    budget = ["--keep", "0.25", "--keep-over", "site", "--keep-by", "parameters"]
    assert run(*LEARN, *FAST, "--method", "activation", *budget, "-o", "budget") == 0
    masks = nadhooks.load("budget")
    assert masks.provenance["keep"] == {"keep": 0.25, "over": "site", "by": "parameters"}
    assert {int(masks.kept_units(site.name).sum(1)[0]) for site in masks.sites} == {2}  # of 8
    assert run(*LEARN, *FAST, "--method", "random", "--keep", "7", "-o", "units") == 0
    masks = nadhooks.load("units")
    assert masks.provenance["keep"] == 7
    assert sum(masks.kept_units(site.name).sum(1) for site in masks.sites).tolist() == [7, 7]  # type: ignore[union-attr]


def test_learn_starts_from_a_baseline_or_a_mask_file_and_the_file_says_so(mask_file: Path) -> None:
    options = [*LEARN, "--tasks", "3", "5", "--no-test", "--method", "class-only"]
    assert run(*options, "--start", "taylor", "--precision", "bfloat16", "--cache", "1", "-o", "ranked") == 0
    origin = nadhooks.load("ranked").provenance
    assert origin["start"] == {"method": "taylor", "options": {"images": 32}}
    assert origin["autocast"] == "bfloat16"
    assert run(*options, "--start", str(mask_file), "-o", "warm") == 0
    origin = nadhooks.load("warm").provenance
    assert origin["method"] == "class-only"
    assert (origin["start"]["file"], origin["start"]["method"], origin["start"]["seed"]) == (
        str(mask_file),
        "contrastive",
        7,
    )


def test_fidelity_is_in_the_file_and_inspect_does_not_pour_out_its_curve(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*LEARN, *FAST, "--method", "class-only", "--fidelity", "0.05", "-o", "faithful") == 0
    origin = nadhooks.load("faithful").provenance
    assert origin["fidelity"] == 0.05
    assert "keep" not in origin
    capsys.readouterr()
    assert run("inspect", "faithful") == 0
    shown = capsys.readouterr().out
    assert "  fidelity: 0.05\n" in shown
    assert f"  curve: {len(origin['curve']['keep'])} points" in shown
    assert "[[" not in shown
    assert run("inspect", "faithful", "--json") == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["curve"] == origin["curve"]


def test_a_stopped_run_goes_on_from_its_checkpoint_and_logs_every_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path("w.pt")
    torch.save(nadhooks.zoo.load_model(MODEL).state_dict(), weights)
    options = [*LEARN, *FAST, "--weights", str(weights), "--method", "class-only"]
    assert run(*options, "-o", "whole") == 0
    saving = [*options, "--checkpoint", "run", "--every", "0", "--log", "run.csv", "-o", "resumed"]
    told = cli.learning._learning

    def stopping(update: Update) -> Report:
        def report(progress: Progress) -> None:
            told(update)(progress)
            if progress.done == 20:
                raise KeyboardInterrupt

        return report

    with monkeypatch.context() as patch:
        patch.setattr(cli.learning, "_learning", stopping)
        assert run(*saving) == 130
    assert Path("run").exists()
    assert run(*saving[:-1], "other", "--seed", "1") == 1
    assert "run is the checkpoint of another run: its seed is 0, here 1" in capsys.readouterr().err
    assert run(*saving) == 0
    assert not Path("run").exists()
    assert nadhooks.load("resumed") == nadhooks.load("whole")
    rows = list(csv.DictReader(Path("run.csv").read_text().splitlines()))
    steps = nadhooks.load("whole").provenance["options"]["steps"]
    assert steps > 20
    assert [int(row["step"]) for row in rows if row["measure"] == "loss"] == [*range(1, 20), *range(21, steps + 1)]


@pytest.mark.parametrize("fails", ["_save", "_show_recognition"])
def test_a_checkpoint_stays_until_masks_and_figures_are_written(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Path("w.pt")
    torch.save(nadhooks.zoo.load_model(MODEL).state_dict(), weights)
    options = [*LEARN, "--weights", str(weights), "--sites", "layer4.*", "--tasks", "3", "--test-images", "2"]
    command = [*options, "--method", "activation", "--checkpoint", "run", "--every", "0", "--log", "run.csv"]

    def fail(*_: object) -> None:
        raise nadhooks.NadhooksError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(cli.learning, fails, fail)
        assert run(*command) == 1
    assert Path("run").exists()
    logged = Path("run.csv").read_text()
    assert run(*command) == 0
    assert not Path("run").exists()
    assert nadhooks.load("masks.safetensors").quality
    assert Path("run.csv").read_text() == logged  # nothing was learnt again


def test_tensorboard_is_asked_for_by_name_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it could not be imported
        assert run(*LEARN, "--log", "runs") == 1
    assert "logging to TensorBoard needs its package: pip install tensorboard" in capsys.readouterr().err
    assert run(*LEARN, *FAST, "--method", "activation", "--log", "runs") == 0
    assert list(Path("runs").glob("events.*"))


def test_the_bar_shows_loss_share_and_time_left_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(printing, "err", screen)
    with printing.bar("learning") as update:
        report = cli.learning._learning(update)
        for _ in range(2):
            for step in range(1, 4):
                report(Progress(step, 4, 0.123, kept=0.55))
                time.sleep(0.15)  # the bar is drawn ten times a second
            report(Progress(4, 4, 0.1, kept=0.5))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.file.getvalue())  # type: ignore[attr-defined]
    lines = [line.strip() for line in re.split(r"[\r\n]+", shown) if "loss" in line]
    assert any(re.fullmatch(r"learning \S+ 3/4 loss 0\.123, 55% kept 0:00:0\d", line) for line in lines), lines
    places = [int(found[1]) for line in lines if (found := re.search(r"(\d)/4", line))]
    assert any(later < before for before, later in itertools.pairwise(places))


def test_a_file_in_the_place_of_the_screen_is_told_now_and_then_how_far_things_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = Console(file=io.StringIO(), width=120)
    monkeypatch.setattr(printing, "err", written)
    monkeypatch.setattr(printing, "FIRST_LINE", 60)
    now = itertools.count(0, 20)  # seconds: every step takes twenty, and the clock is read once for the beginning
    monkeypatch.setattr(printing, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with printing.bar("measuring") as update:
        for step in range(1, 16):
            update(step, 2000, "loss 1")
    lines = written.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.partition(", ")[0] for line in lines] == [f"measuring: {done} of 2,000" for done in (3, 6, 12)]
    assert all(re.search(r", loss 1, \d+:\d\d:\d\d left$", line) for line in lines), lines


def test_inspect_graph_and_render(mask_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", str(mask_file)) == 0
    assert run("graph", str(mask_file), "--task", "5", "-o", "g.json") == 0
    assert run("render", str(mask_file)) == 0
    assert run("render", str(mask_file), "--task", "3", "-o", "three.png") == 0
    shown = capsys.readouterr().out
    assert "contrastive" in shown
    assert "layer4.1" in shown
    assert {node["id"] for node in json.loads(Path("g.json").read_text())["nodes"]} >= {"input", "layer1.0", "output"}
    assert Path("flow.svg").read_text().startswith("<?xml")
    assert Path("three.png").read_bytes().startswith(b"\x89PNG")


def test_several_tasks_are_combined_for_people_and_programs(
    mask_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, masks = str(mask_file), nadhooks.load(mask_file)
    assert run("graph", path, "--task", "3", "5", "--combine", "difference", "--joins", "-o", "g.graphml") == 0
    assert "task 3 without 5: " in capsys.readouterr().out
    apart = ["--task", "3", "--combine", "difference", "--joins", "--task", "5", "-o", "apart.graphml"]
    assert run("graph", path, *apart) == 0
    assert Path("apart.graphml").read_bytes() == Path("g.graphml").read_bytes()
    graph = nadhooks.read_graph("g.graphml")
    only = masks.kept_units("layer1.0")[0] & ~masks.kept_units("layer1.0")[1]
    assert graph.nodes["layer1.0"]["kept"] == int(only.sum())
    assert any(data["kind"] == "join" for _, data in graph.nodes(data=True))
    assert run("render", path, "--task", "3", "5", "--width", "single", "--collapse", "-o", "two.pdf") == 0
    assert Path("two.pdf").read_bytes().startswith(b"%PDF")
    assert run("render", path, "-o", "page.html") == 0
    assert "layer1.0" in Path("page.html").read_text()


def test_sites_lists_units_wiring_and_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sites", "torchvision:vit_b_16", "--sites", "channels") == 0
    shown = capsys.readouterr().out
    assert "encoder.layers.encoder_layer_1.mlp.0" in shown
    assert "left out, 13:" in shown
    assert "in_proj_weight:\n    encoder.layers.encoder_layer_0.self_attention" in shown
    assert "100% of 86,567,656 parameters behind" in shown


OWN = """
import torch
from torchvision.transforms.functional import to_tensor
def build():
    layers = [torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 8, 3), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10))
transform = to_tensor
"""


def test_own_models_in_a_file_need_nothing_but_their_transform(capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(OWN)
    assert run("learn", "net.py:build", "--data", "digits", "--tasks", "0", "1", "--no-test") == 0
    told = capsys.readouterr().err
    assert "the weights are those that net.py:build gives; pass --weights FILE if it loads none" in told
    masks = nadhooks.load("masks.safetensors")
    assert [site.name for site in masks.sites] == ["1", "5"]
    assert masks.provenance["trained"] == "net.py:build"
    assert run("sites", "net.py:build") == 1
    assert "what input Sequential takes; give the size by --image-size" in capsys.readouterr().err
    assert run("sites", "net.py:build", "--image-size", "8") == 0
    assert "AdaptiveAvgPool2d" not in capsys.readouterr().out
    Path("sized.py").write_text(OWN + "transform = lambda image: to_tensor(image.convert('L').resize((8, 8)))")
    assert run("sites", "sized.py:build") == 0
    assert "2 sites, 14 units" in capsys.readouterr().out
    assert run("learn", "net.py:build", "--data", "digits", "--image-size", "8") == 1
    assert "follows from `transform` in net.py; leave out --image-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sites", "timm:resnet81"], "timm has no model 'resnet81'"),
        (["sites", MODEL, "--sites", "layer9"], "no module name matches 'layer9'"),
        (["sites", MODEL, "--device", "nonsense"], "--device nonsense cannot be used here"),
        (
            [*LEARN, "--tasks", "0", "1", "--method", "nad", "--closed", "optimal"],
            "closed: expected 'zero' or 'mean', got 'optimal', which is learnt",
        ),
        (["learn", MODEL, "--data", "nowhere"], "expected a directory of images or one of digits, fashion-mnist"),
        (["learn", MODEL, "--data", "digits", "-o", "no/m.safetensors"], "cannot write no/m.safetensors: no is not"),
        (["learn", MODEL, "--data", "digits", "-o", "."], "cannot write .: it is a directory; name a file"),
        ([*LEARN, "--tasks", "12"], "digits has no images of label 12"),
        ([*LEARN, "--beta", "0.1"], "--beta is an option of --method nad, got --method contrastive"),
        ([*LEARN, "--epochs", "3", "--method", "class-only"], "--epochs is an option of --method nad"),
        (["sites", MODEL, "--device", "meta"], "--device meta cannot be used here"),
        ([*LEARN, "--method", "nad", "--keep", "0.3"], "from its options, got --keep 0.3"),
        ([*LEARN, "--method", "nad", "--fidelity", "0.1"], "from its options, got --fidelity 0.1"),
        ([*LEARN, "--method", "nad", "--keep", "0.3", "--keep-over", "site"], "from its options, got --keep 0.3"),
        ([*LEARN, "--keep", "0.3", "--fidelity", "0.1"], "expected --keep or --fidelity, got both"),
        ([*LEARN, "--keep", "9999"], "keep: expected at most the network's 64 units, got 9999"),
        ([*LEARN, "--keep", "9", "--keep-by", "flops"], "keep: expected a share of the flops, got the whole number 9"),
        ([*LEARN, "--keep-over", "site"], "--keep-over says what --keep means; pass --keep, too"),
        ([*LEARN, "--every", "5"], "pass --checkpoint FILE, too"),
        ([*LEARN, "--checkpoint", "no/run"], "cannot write the checkpoint no/run: No such file or directory"),
        ([*LEARN, "--start", "magic"], "taylor, routing or a mask file; magic: cannot read it: No such file"),
        (
            [*LEARN, "--start", "nad", "--keep", "0.3"],
            "'contrastive' cannot begin with 'nad', for 'nad' reads the loader itself",
        ),
        ([*LEARN, "--log", "no/run.csv"], "cannot write the log no/run.csv: No such file or directory"),
        ([*LEARN, "--axis", "7"], "--axis 7 does not fit a tensor of shape"),
        (["sites", "timm:resnet10t", "--sites", "heads"], "pass --sites with globs"),
        ([*LEARN, "--weights", "nothing.pt"], "no weights file nothing.pt"),
        (["inspect", "nothing"], "nothing: cannot read it: No such file or directory"),
        (["render", "nothing"], "nothing: cannot read it"),
    ],
)
def test_bad_input_ends_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("nadhooks: error: ")
    assert message in last


def test_a_damaged_image_is_named_in_one_line_by_loading_processes_too(capsys: pytest.CaptureFixture[str]) -> None:
    folders(Path("pictures"), "cat", "dog")
    Path("pictures/cat/3.png").write_bytes(b"no picture")
    for workers in ("0", "2"):
        assert run("learn", MODEL, "--data", "pictures", "--no-test", "--device", "cpu", "--workers", workers) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("nadhooks: error: pictures/cat/3.png: expected an image, got a damaged file or none")
        assert len(last) < 200


def test_the_folder_that_a_graph_cannot_be_written_to_is_named(
    mask_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("graph", str(mask_file), "-o", "no/g.json") == 1
    shown = capsys.readouterr()
    assert "cannot write no/g.json: no is not a directory" in shown.err
    assert not shown.out
    with pytest.raises(FileNotFoundError) as raised:
        write_bytes("no/g.json", b"")
    assert raised.value.filename == "no"


def test_classes_that_cannot_be_measured_are_named_before_the_learning(capsys: pytest.CaptureFixture[str]) -> None:
    folders(folders(Path("pictures/train"), "cat", "dog"), "eel")
    folders(Path("pictures/val"), "cat", "dog")
    assert run("learn", MODEL, "--data", "pictures") == 1
    assert "pictures has no held-out images of 'eel' to measure on; add some, or pass" in capsys.readouterr().err
    assert run("learn", MODEL, "--data", "pictures", "--tasks", "0", "--image-size", "32") == 0
    folders(Path("alone/train"), "cat")
    folders(Path("alone/val"), "cat")
    assert run("learn", MODEL, "--data", "alone", "--method", "class-only") == 1
    assert "alone has no held-out images of other classes" in capsys.readouterr().err


def test_render_names_tasks_and_suffixes(mask_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("render", str(mask_file), "--task", "9") == 1
    assert "unknown task 9: expected one of 3, 5" in capsys.readouterr().err
    assert run("render", str(mask_file), "-o", "x.bmp") == 1
    assert "got '.bmp'" in capsys.readouterr().err
    assert run("render", str(mask_file), "--task", "²") == 1
    assert "unknown task '²'" in capsys.readouterr().err


def test_too_large_pictures_name_the_number_of_sites_to_collapse_to(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(80)))
    with nadhooks.attach(model, ["*"], example=torch.ones(1, 2)) as gates:
        gates.masks().save("deep")
    assert run("render", "deep", "--width", "single", "--collapse") == 1
    assert "48 stages and" in (said := capsys.readouterr().err)
    assert re.search(r"pass --collapse 24, choose fewer sites, pass a larger --width, or", said)
    assert run("render", "deep", "--width", "single", "--collapse", "24") == 0
    assert Path("flow.svg").exists()


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(nadhooks.NadhooksError):
        run("inspect", "nothing", "--debug")


@pytest.mark.parametrize("arguments", [[], ["paint"], ["learn"], [*LEARN, "--method", "magic"]])
def test_bad_usage_exits_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--batch-size", "0", "a number of at least 1"),
        ("--image-size", "-5", "a number of at least 1"),
        ("--epochs", "0", "a number of at least 1"),
        ("--epochs", "many", "a number of at least 1"),
        ("--workers", "-1", "a number of at least 0"),
        ("--keep", "1.5", "a share above 0 and at most 1, or a whole number of units"),
        ("--keep", "0", "a share above 0 and at most 1, or a whole number of units"),
        ("--keep", "nan", "a share above 0 and at most 1, or a whole number of units"),
        ("--fidelity", "0", "a divergence above 0"),
        ("--fidelity", "inf", "a divergence above 0"),
        ("--every", "-1", "a number of seconds of at least 0"),
        ("--cache", "2.5", "a number of at least 0"),
        ("--beta", "-2", "a weight of at least 0"),
        ("--beta", "nan", "a weight of at least 0"),
        ("--seed", str(2**64), "a number from -2**63 to 2**64 - 1"),
    ],
)
def test_numbers_out_of_range_are_bad_usage(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*LEARN, option, value)
    assert ended.value.code == 2
    assert f"argument {option}: expected {expected}, got '{value}'" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, mask_file: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.files, "load", interrupt)
    assert run("inspect", str(mask_file)) == 130


def test_the_module_runs_as_a_program() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "nadhooks", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in ("demo", "sites", "learn", "graph", "render", "inspect"):
        assert f"\n    {command} " in shown


def test_the_demo_leaves_masks_pictures_and_a_matrix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "EPOCHS", 3)  # enough to be well above chance
    assert run("demo", "--device", "cpu") == 0
    names = {"masks.safetensors", "flow.html", "flow-all.svg", "similarity.csv", "similarity.svg"} | {
        f"flow-{d}.svg" for d in range(10)
    }
    assert set(os.listdir("demo")) == names
    matrix = [line.split(",") for line in Path("demo/similarity.csv").read_text().splitlines()]
    assert matrix[0] == ["task", *map(str, range(10))]
    assert all(float(matrix[row][row]) == 1 for row in range(1, 11))
    means = capsys.readouterr().out.split("mean ")[1]
    assert "sub-architecture" in means
    masks = nadhooks.load("demo/masks.safetensors")
    assert len(masks.sites) == 9
    assert len(set(map(tuple, masks["layer4.0"].tolist()))) == 10  # every class has a mask of its own
    pictures = [Path(f"demo/flow-{d}.svg").read_bytes() for d in range(10)]
    assert len(set(pictures)) == 10
    assert run("demo", "--device", "cpu") == 0  # the trained network is kept: the same masks, the same pictures
    assert nadhooks.load("demo/masks.safetensors") == masks
    assert [Path(f"demo/flow-{d}.svg").read_bytes() for d in range(10)] == pictures


def test_masks_that_cannot_be_written_in_the_end_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "out").mkdir()

    def learn(*arguments: object, **options: object) -> Masks:
        masks = nadhooks.learn(*arguments, **options)  # type: ignore[arg-type]
        (tmp_path / "out").rmdir()
        return masks

    monkeypatch.setattr(cli.learning, "learn", learn)
    assert run(*LEARN, *FAST, "--method", "random", "-o", "out/m.safetensors") == 1
    found = re.search(r"cannot write .*out.*; the masks are in (\S+)\n", capsys.readouterr().err)
    assert found
    assert len(nadhooks.load(found[1])) == 2


def test_names_are_shown_as_they_are_whatever_is_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = Tasks.of({0: "[/b] cat", 1: ":dog:", 2: "[red]" + "x" * 150})
    Masks(THREE.sites, THREE.values, odd, THREE.wiring).save("odd.safetensors")
    Masks(THREE.sites, THREE.values, Tasks.of({0: "[/b]", 1: "a", 2: "b"}), THREE.wiring).save("other.safetensors")
    assert run("inspect", "odd.safetensors") == run("diff", "odd.safetensors", "other.safetensors") == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if re.match(r"\[/b\] cat |:dog: |\[red\]x+… ", line)]
    assert len(rows) == 2 * 3  # of both commands
    assert all(re.search(r" \d+% ", row) for row in rows)  # what it keeps
    run("inspect", "--json", "odd.safetensors")
    assert [task["name"] for task in json.loads(capsys.readouterr().out)["tasks"]] == list(odd.names)


def test_results_of_classes_with_odd_names_are_files_and_columns_of_their_own(tmp_path: Path) -> None:
    odd = Tasks.of({0: "boot/shoe", 1: "shark, white", 2: "boot-shoe"})
    written = demo.write_results(tmp_path, Masks(THREE.sites, THREE.values, odd, THREE.wiring))
    assert sorted(os.listdir(tmp_path)) == sorted({path.name for path in written})
    assert {"flow-boot%2Fshoe.svg", "flow-shark%2C%20white.svg", "flow-boot-shoe.svg"} <= set(os.listdir(tmp_path))
    rows = list(csv.reader((tmp_path / "similarity.csv").read_text().splitlines()))
    assert [row[0] for row in rows[1:]] == rows[0][1:] == list(odd.names)
    assert {len(row) for row in rows} == {4}


def test_the_similarity_picture_grows_with_the_names_in_it() -> None:
    def width(*names: str) -> float:
        found = re.search(rb'<svg [^>]*width="([\d.]+)pt"', demo.similarity_picture(torch.eye(len(names)), names))
        assert found
        return float(found[1])

    assert width("a", "b") > 100  # points, the title
    assert width("great white shark, man-eater", "b") > width("great white", "b") + 50


@pytest.fixture(scope="module")
def measured_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of a network of fixed weights, with the quality that `learn` measured."""
    folder = tmp_path_factory.mktemp("measured")
    torch.manual_seed(0)
    nadhooks.zoo.load_model(MODEL)
    weights = folder / "w.pt"
    torch.save(nadhooks.zoo.load_model(MODEL).state_dict(), weights)
    arguments = ["--weights", str(weights), "--tasks", "3", "5", "--sites", "layer[34].*", "-o", str(folder / "m")]
    assert run(*LEARN, *arguments) == 0
    return folder / "m"


def test_verify_finds_what_the_file_states(measured_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = nadhooks.load(measured_file)
    assert set(masks.quality) == {"recall", "fpr", "auc", "fpr95"}
    assert masks.provenance["quality"]["images"] == 360  # a fifth of the digits
    weights = ["--weights", str(measured_file.parent / "w.pt")]
    verify = ["verify", str(measured_file), "--image-size", "32", "--data", "digits", "--device", "cpu"]
    assert run(*verify, *weights) == 0
    shown = capsys.readouterr().out
    assert "the same" in shown
    assert "as stated, within 0.02, on 360 images of digits" in shown
    shifted = masks.replaced(quality={**masks.quality, "auc": masks.quality["auc"] - 0.1})
    shifted.save("shifted")
    assert run("verify", "shifted", *verify[2:], *weights) == 1
    assert "the mean of AUC is not within 0.02 of what the file states" in capsys.readouterr().err
    partly = masks.quality["recall"].index_fill(0, torch.tensor([1]), torch.nan)
    nothing = torch.full_like(partly, torch.nan)
    masks.replaced(quality={**masks.quality, "recall": partly, "fpr": nothing}).save("partly")
    assert run("verify", "partly", *verify[2:], *weights) == 0
    assert "none" in capsys.readouterr().out
    masks.replaced(provenance={**masks.provenance, "model": "timm.models.resnet.ResNet"}).save("scripted")
    assert run("verify", "scripted", *verify[2:]) == 1
    assert "scripted says that its model is timm.models.resnet.ResNet, which is not made" in capsys.readouterr().err
    assert run("verify", "scripted", MODEL, *verify[2:], *weights) == 0
    masks.replaced(quality={}).save("silent")
    assert run("verify", "silent", *verify[2:]) == 1
    assert "states no quality" in capsys.readouterr().err


def test_a_strangers_file_runs_no_code_of_its_choice(
    measured_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef build(): pass\n")
    masks = nadhooks.load(measured_file)
    for spec in (
        f"{tmp_path / 'evil.py'}:build",
        f"{os.__file__}:system,command='touch {tmp_path / 'ran'}'",
        "timm:hf-hub:stranger/model",
        "timm:resnet18,checkpoint_path='evil.pth'",
    ):
        masks.replaced(provenance={**masks.provenance, "model": spec}).save(tmp_path / "evil")
        for command in (["verify"], ["units", "--task", "3"]):
            assert run(command[0], str(tmp_path / "evil"), *command[1:], "--data", "digits") == 1
            assert "is not made without being asked for; name the model after the masks" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_inspect_shows_everything_and_prints_it_for_programs(
    measured_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", str(measured_file)) == 0
    shown = capsys.readouterr().out
    for word in ("structure: sha256:", "weights: sha256:", '"torch":', "recall", "AUC", "fed by", "contrastive"):
        assert word in shown
    assert run("inspect", str(measured_file), "--json") == 0
    described = json.loads(capsys.readouterr().out)
    masks = nadhooks.load(measured_file)
    assert [task["label"] for task in described["tasks"]] == [3, 5]
    assert described["tasks"][0]["auc"] == pytest.approx(float(masks.quality["auc"][0]))
    assert [site["name"] for site in described["sites"]] == [site.name for site in masks.sites]
    assert described["provenance"] == dict(masks.provenance)


def test_select_and_merge_are_inverse_and_diff_says_so(measured_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(measured_file)
    assert run("select", path, "5", "-o", "five") == 0
    assert run("select", path, "3", "-o", "three") == 0
    assert run("merge", "three", "five", "-o", "both") == 0
    assert nadhooks.load("both") == nadhooks.load(path)
    capsys.readouterr()
    assert run("diff", "both", path) == 0
    assert "the same tasks, sites, wiring, gates and closed values" in capsys.readouterr().out
    assert run("merge", "three", "both", "-o", "none") == 1
    assert "every task label once, got 3" in capsys.readouterr().err
    assert not Path("none").exists()
    assert run("diff", "three", "five") == 1
    shown = capsys.readouterr()
    assert "tasks only here: 3" in shown.out
    assert "no task in common" in shown.err
    assert run("select", path, "7", "-o", "seven") == 1
    assert "unknown task 7" in capsys.readouterr().err


def test_diff_counts_what_two_files_share(capsys: pytest.CaptureFixture[str]) -> None:
    THREE.save("a")
    other = {**THREE.values, "a": THREE["a"].flip(1)}
    renamed = Tasks.of({0: "cat", 1: "t1", 2: "t2"})
    THREE.replaced(other, renamed, provenance={"seed": 2}).save("b")
    assert run("diff", "a", "b", "--rows", "2") == 0
    shown = capsys.readouterr().out
    assert "seed: (none) | 2" in shown
    assert re.search(r"a +4 +33% +33% +0\.333", shown)  # {0,1} and {2,3}, {0,2} and {1,3}, {} and {}
    assert re.search(r"b@input +2 +17% +17% +1\.000", shown)
    assert re.search(r"t0 \| cat .* 0\.500", shown)
    assert "… 1 more tasks, which the mean includes (--rows 3)" in shown


def test_diff_shows_where_two_tasks_of_a_file_part(capsys: pytest.CaptureFixture[str]) -> None:
    THREE.save("a")
    assert run("diff", "a", "--task", "0", "1") == 0
    shown = capsys.readouterr().out
    assert re.search(r"site +units +kept by .* +by .* +by both +Jaccard +by chance", shown)
    assert re.search(r"a +4 +2 +2 +1 +0\.333 +0\.333\n", shown)  # {0,1} and {0,2}: by chance they share 2 · 2 / 4
    assert re.search(r"b@input +2 +1 +0 +0 +0\.000 +0\.000\n", shown)  # {0} and {}
    assert re.search(r"sum, mean +6 +3 +2 +1 +0\.167 +0\.167\n", shown)
    for arguments in (["a"], ["a", "a", "--task", "0", "1"], ["a", "a", "a"]):
        assert run("diff", *arguments) == 1
        assert "expected two mask files, or one and --task with two of its tasks, got" in capsys.readouterr().err


def checkpoints(folder: Path, sizes: list[int]) -> None:
    """As the authors' findpath.py leaves them."""
    generator = torch.Generator().manual_seed(0)
    for label in (0, 2):
        (folder / f"{label:03d}").mkdir(parents=True)
        for epoch in (0, 1):
            logits = {
                f"mask.{index}": torch.nn.Parameter(torch.randn(1, size, 1, 1, generator=generator))
                for index, size in enumerate(sizes)
            }
            torch.save(logits, folder / f"{label:03d}" / f"net_iter{epoch:03d}.pth")


def test_the_authors_checkpoints_become_a_mask_file(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints(Path("checkpoint"), [8] * 8)
    assert run("convert", "checkpoint", MODEL, "-o", "m") == 0
    masks = nadhooks.load("m")
    assert masks.labels == (0, 2)
    assert masks.provenance["model"] == MODEL
    last = torch.load("checkpoint/002/net_iter001.pth", weights_only=True)
    torch.testing.assert_close(masks["layer4.1"][1], last["mask.7"].detach().flatten().sigmoid())
    assert run("convert", "checkpoint", MODEL, "-o", "m", "--epoch", "0") == 0
    assert nadhooks.load("m") != masks
    for arguments, message in (
        (["checkpoint", MODEL, "--epoch", "7"], "expected net_iter007.pth, found epochs [0, 1]"),
        (["checkpoint", MODEL, "--sites", "layer1.*"], "they differ from number 2 on"),
        (["checkpoint/000", MODEL], "expected folders named by class numbers"),
        (["nowhere", MODEL], "expected a folder with a folder for each class"),
    ):
        assert run("convert", *arguments, "-o", "m") == 1
        assert message in capsys.readouterr().err
    torch.save({"mask.0": torch.nn.Linear(1, 1)}, "checkpoint/000/net_iter001.pth")  # pickled code
    assert run("convert", "checkpoint", MODEL, "-o", "m") == 1
    assert "not a checkpoint that can be read safely" in capsys.readouterr().err
    torch.save({"mask.0": torch.zeros(1, 8, 1, 1).to_sparse()}, "checkpoint/000/net_iter001.pth")
    assert run("convert", "checkpoint", MODEL, "-o", "m") == 1
    assert "mask.0 is not a tensor of logits" in capsys.readouterr().err
    Path("checkpoint/000/net_iter001.pth").write_bytes(b"\x80\x02garbage")
    assert run("convert", "checkpoint", MODEL, "-o", "m") == 1
    assert "not a checkpoint that can be read safely" in capsys.readouterr().err
    Path("checkpoint/0").mkdir()
    assert run("convert", "checkpoint", MODEL, "-o", "m") == 1
    assert "are one class" in capsys.readouterr().err


def test_push_publishes_what_inspect_then_finds(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    THREE.save("m")
    assert run("push", "m", "us/masks", "--license", "cc-by-4.0", "--private") == 0
    address = re.search(r"load\('(hf://us/masks@\w+)'\)", capsys.readouterr().out)
    assert address
    assert run("inspect", address[1]) == 0
    assert "3 tasks" in capsys.readouterr().out
    assert nadhooks.load(address[1]) == THREE
    assert run("push", "m", "no name") == 1
    assert "expected a repository of the Hub, org/name, got 'no name'" in capsys.readouterr().err


def test_units_draws_one_classs_flow_and_proves_it(measured_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--weights", str(measured_file.parent / "w.pt"), "--image-size", "32", "--data", "digits"]
    assert run("units", str(measured_file), "--task", "5", *options, "--images", "2", "--prove", "-o", "u.json") == 0
    shown = capsys.readouterr().out
    assert "the same" in shown
    figures = re.search(r"the target, when an edge's source is closed +(\S+) +(\S+)", shown)
    assert figures is not None
    assert min(map(float, figures.groups())) > 0.9
    graph = nadhooks.read_graph("u.json")
    assert graph.graph["level"] == "unit"
    assert graph.graph["images"] == 2
    shut = nadhooks.load(measured_file)
    shut.replaced(values={site: torch.zeros_like(gates) for site, gates in shut.values.items()}).save("shut")
    assert run("units", "shut", "--task", "5", *options, "--images", "2", "--prove", "-o", "u.json") == 0
    shown = capsys.readouterr().out
    assert re.search(r"the target, when an edge's source is closed +none +none", shown)
    assert "no edges: what this mask lets through" in shown
    assert run("units", str(measured_file), "--task", "3", *options, "-o", "no/u.svg") == 1
    assert "no is not a directory" in capsys.readouterr().err
    assert run("units", str(measured_file), "--task", "7", *options) == 1
    assert "unknown task 7" in capsys.readouterr().err


def test_it_works_where_nothing_can_be_printed(measured_file: Path) -> None:
    shell = f"{sys.executable} -m nadhooks render {measured_file} --task 3 -o flow.svg >&- 2>&-"
    assert subprocess.run(shell, shell=True).returncode == 0
    assert Path("flow.svg").exists()
