from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import nn

import nadhooks
from nadhooks import zoo
from nadhooks.cli.models import with_wordnet
from nadhooks.errors import ModelError
from nadhooks.tasks import Tasks

FACTORY = """
import torch
import torchvision
def net(width=3):
    return torch.nn.Sequential(torch.nn.Conv2d(1, width, 1), torch.nn.Flatten(), torch.nn.Linear(4 * width, 2))
def number():
    return 3
def transform(image):
    return torch.ones(1, 2, 2)
"""


def test_models_come_from_three_sources(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FACTORY)
    timm = zoo.load_model("timm:resnet18,num_classes=7,in_chans=1,channels=(8,16,16,32)")
    assert (timm.get_submodule("fc").out_features, timm.get_submodule("conv1").in_channels) == (7, 1)
    assert zoo.load_model("torchvision:vgg11,num_classes=3").get_submodule("classifier.6").out_features == 3
    own = zoo.load_model(f"{tmp_path}/own.py:net,width=5")
    assert own.get_submodule("0").out_channels == 5
    assert not own.training


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "expected timm:NAME, torchvision:NAME or file.py:factory, got 'resnet18'"),
        ("timm:", "expected timm:NAME"),
        ("timm:resnet81", "timm has no model 'resnet81'; did you mean"),
        ("torchvision:vgg61", "torchvision has no model 'vgg61'"),
        ("timm:resnet18,wide", "expected key=value,key=value behind the model's name, got 'wide'"),
        ("timm:resnet18,width=open('x')", "expected key=value"),
        ("timm:resnet18,colour=3", "timm:resnet18 cannot be made: TypeError"),
        ("nowhere.py:net", "no file nowhere.py"),
        ("{own}:missing", "there is no such function"),
        ("{own}:number", "made a int, expected a torch.nn.Module"),
        ("{broken}:net", "cannot be imported: NameError"),
    ],
)
def test_bad_model_names_are_explained(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "own.py").write_text(FACTORY)
    (tmp_path / "broken.py").write_text("x = y")
    with pytest.raises(ModelError, match=re.escape(message)):
        zoo.load_model(spec.format(own=tmp_path / "own.py", broken=tmp_path / "broken.py"))


def test_weights_are_loaded_safely_and_strictly(tmp_path: Path) -> None:
    spec = "timm:resnet18,num_classes=2,channels=(8,8,8,8)"
    model = zoo.load_model(spec)
    state = model.state_dict()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "checkpoint.pt")
    for name in ("w.safetensors", "w.pt", "checkpoint.pt"):
        loaded = zoo.load_model(spec, weights=str(tmp_path / name))
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    with pytest.raises(ModelError, match="no weights file"):
        zoo.load_model(spec, weights=str(tmp_path / "missing.pt"))


def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({1: 2}, tmp_path / "numbers.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:500])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "folder.pt").mkdir()
    for name in ("empty.pt", "empty.safetensors"):
        (tmp_path / name).touch()
    for name, message in (
        ("pickled.pt", r"expected a state_dict, written by .*, got a pickled torch.nn.modules.linear.Linear"),
        ("list.pt", "expected a state_dict, written by .*, got a list"),
        ("numbers.pt", "expected a state_dict, written by .*, got a dict"),
        ("half.pt", "expected a state_dict, written by .*, got a damaged file or one of another kind"),
        ("text.pt", "got a damaged file"),
        ("empty.pt", "got a damaged file"),
        ("empty.safetensors", "expected a safetensors file, got a damaged file"),
        ("folder.pt", "cannot be read: Is a directory"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            zoo.load_weights(nn.Linear(2, 2), str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert len(str(caught.value)) < len(str(tmp_path / name)) + 150
        assert str(caught.value).isprintable()


def test_weights_of_another_model_are_told_by_the_first_difference(tmp_path: Path) -> None:
    path = str(tmp_path / "w.pt")
    torch.save(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)).state_dict(), path)
    with pytest.raises(
        ModelError, match=r"got others: '1.weight' has shape \(4, 3\), expected \(5, 3\); name the model"
    ):
        zoo.load_weights(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5)), path)
    with pytest.raises(
        ModelError,
        match=r"this Linear, got others: 1 of 1 keys missing \(first 'weight'\), 4 unexpected \(first '0.w",
    ):
        zoo.load_weights(nn.Linear(2, 3, bias=False), path)
    with pytest.raises(ModelError, match=r"got others: 2 unexpected \(first '1.weight'\); name"):
        zoo.load_weights(nn.Sequential(nn.Linear(2, 3)), path)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("timm:resnet18,in_chans=1", (1, 1, 224, 224)),
        ("timm:vit_tiny_patch16_224,img_size=64", (1, 3, 64, 64)),
        ("torchvision:resnet50", (1, 3, 224, 224)),
        ("torchvision:inception_v3,init_weights=False", (1, 3, 299, 299)),
        ("torchvision:vit_b_16,image_size=32", (1, 3, 32, 32)),
    ],
)
def test_the_example_is_what_the_model_says_of_its_input(spec: str, shape: tuple[int, ...]) -> None:
    model = zoo.load_model(spec)
    random = torch.random.get_rng_state()
    assert zoo.example_for(model).shape == shape
    assert zoo.example_for(model.double()).dtype == torch.float64
    assert zoo.example_for(nn.DataParallel(model)).shape == shape
    assert torch.equal(random, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("spec", "cure"),
    [
        ("timm:vit_tiny_patch16_224", "timm:NAME,img_size=96"),
        ("torchvision:vit_b_16", "torchvision:NAME,image_size=96"),
    ],
)
def test_models_of_one_size_refuse_another(spec: str, cure: str) -> None:
    model = zoo.load_model(spec)
    with pytest.raises(ModelError, match=f"expected images of 224 x 224, .* got 96; make it for that size: {cure}"):
        zoo.set_image_size(model, 96)
    zoo.set_image_size(model, 224)
    assert zoo.example_for(model).shape == (1, 3, 224, 224)


def test_models_of_any_size_take_the_one_that_is_set() -> None:
    model = zoo.load_model("timm:vit_tiny_patch16_224,img_size=64,dynamic_img_size=True")
    assert zoo.example_for(model).shape == (1, 3, 64, 64)
    zoo.set_image_size(nn.DataParallel(model), 96)
    assert zoo.transform_for(model)(Image.new("L", (9, 9))).shape == zoo.example_for(model)[0].shape == (3, 96, 96)


def test_transforms_are_the_models_own() -> None:
    image = Image.new("RGB", (300, 200), (255, 0, 0))
    for spec, mean, std in (
        ("timm:vit_tiny_patch16_224", 0.5, 0.5),
        ("timm:resnet18", 0.485, 0.229),
        ("torchvision:resnet18", 0.485, 0.229),
    ):
        transform = zoo.transform_for(zoo.load_model(spec), spec)
        made = pickle.loads(pickle.dumps(transform))(image)  # processes that load images may be spawned
        assert made.shape == (3, 224, 224)
        torch.testing.assert_close(made[0], torch.full((224, 224), (1 - mean) / std))
    grey = zoo.load_model("timm:resnet18,in_chans=1")
    zoo.set_image_size(grey, 32)
    assert zoo.transform_for(grey)(image).shape == (1, 32, 32)


def test_own_models_bring_their_transform(tmp_path: Path) -> None:
    (tmp_path / "own2.py").write_text(FACTORY)
    spec = f"{tmp_path}/own2.py:net"
    model = zoo.load_model(spec)
    assert zoo.transform_for(model, spec)(None).shape == (1, 2, 2)
    with pytest.raises(ModelError, match="pass example="):
        nadhooks.attach(model)
    (tmp_path / "bare.py").write_text(FACTORY.replace("def transform", "def other"))
    with pytest.raises(ModelError, match="define a function `transform`"):
        zoo.transform_for(model, f"{tmp_path}/bare.py:net")


def test_own_files_import_the_files_beside_them(tmp_path: Path) -> None:
    (tmp_path / "blocks_of_mine.py").write_text("from torch import nn\ndef block(): return nn.Linear(2, 2)")
    (tmp_path / "own3.py").write_text("from blocks_of_mine import block as net")
    before = list(sys.path)
    assert isinstance(zoo.load_model(f"{tmp_path}/own3.py:net"), nn.Linear)
    assert sys.path == before
    (tmp_path / "own6.py").write_text("def net():\n    from blocks_of_mine_too import block\n    return block()")
    (tmp_path / "blocks_of_mine.py").rename(tmp_path / "blocks_of_mine_too.py")
    assert isinstance(zoo.load_model(f"{tmp_path}/own6.py:net"), nn.Linear)
    assert sys.path == before
    (tmp_path / "own4.py").write_text("import blocks_of_nobody")
    with pytest.raises(ModelError, match="No module named 'blocks_of_nobody'"):
        zoo.load_model(f"{tmp_path}/own4.py:net")
    assert sys.path == before


def test_own_files_that_end_the_program_or_were_stopped_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import sys\ndef net(): sys.exit('no')")
    with pytest.raises(ModelError, match="cannot be made: SystemExit: no"):
        zoo.load_model(f"{tmp_path}/ends.py:net")
    (tmp_path / "stopped.py").write_text("raise KeyboardInterrupt")
    for _ in range(2):  # nothing half imported stays
        with pytest.raises(KeyboardInterrupt):
            zoo.load_model(f"{tmp_path}/stopped.py:net")


def test_own_files_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    for width in (2, 3):
        (tmp_path / str(width)).mkdir()
        text = f"import torch\ndef net(): return torch.nn.Linear({width}, 1)"
        (tmp_path / str(width) / "namesake.py").write_text(text)
        assert zoo.load_model(f"{tmp_path}/{width}/namesake.py:net").in_features == width


def test_own_files_may_have_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "own5.py").write_text(
        "from __future__ import annotations\nimport dataclasses, torch\n"
        "@dataclasses.dataclass\nclass Config:\n    width: int = 4\n"
        "def net(): return torch.nn.Linear(Config().width, 1)"
    )
    assert zoo.load_model(f"{tmp_path}/own5.py:net").in_features == 4


def test_imagenet_classes_are_known_by_name_and_wordnet_id() -> None:
    for spec in ("timm:resnet18", "torchvision:resnet18"):
        known = zoo.class_index_of(zoo.load_model(spec))
        assert known["n01440764"] == 0  # tench
        assert known["n15075141"] == 999  # toilet paper
        assert (known["tench"], known["goldfish"]) == (0, 1)
        named = with_wordnet(Tasks.of({1: "goldfish", 0: "n01440764"}), known)
        assert named.wordnet == ("n01443537", "n01440764")
        assert not with_wordnet(Tasks.of({0: "shirt", 1: "tench"}), known).wordnet  # others with a thousand outputs
    resized = zoo.load_model("torchvision:resnet18")
    zoo.set_image_size(resized, 32)
    assert zoo.class_index_of(resized)["tench"] == 0
    for spec in ("timm:resnet18,num_classes=10", "torchvision:resnet18,num_classes=10"):
        assert zoo.class_index_of(zoo.load_model(spec)) == {}


def test_pretrained_weights_of_timm_come_from_the_hubs_cache(tmp_path: Path) -> None:
    """The hub's own code, offline, with a file that lies where a download would have put it."""
    model = zoo.load_model("timm:test_resnet")
    folder = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    safetensors.torch.save_file(model.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    program = (
        "import torch; from nadhooks import zoo; m = zoo.load_model('timm:test_resnet', pretrained=True);"
        "torch.save(m.state_dict(), 'loaded.pt')"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True)
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_pretrained_weights_of_torchvision_come_from_torch_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.load_model("torchvision:squeezenet1_1")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    name = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    loaded = zoo.load_model("torchvision:squeezenet1_1", pretrained=True).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "url", "http://127.0.0.1:9/x.pth")
    with pytest.raises(ModelError, match="squeezenet1_1: its pretrained weights cannot be fetched: <urlopen"):
        zoo.load_model("torchvision:squeezenet1_1", pretrained=True)


def test_an_unreachable_hub_of_timm_ends_in_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "nadhooks", "sites", "timm:test_resnet", "--pretrained"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.returncode == 1
    assert shown.stderr.startswith("nadhooks: error: timm:test_resnet: its pretrained weights cannot be fetched: ")
    assert shown.stderr.count("\n") == 1
