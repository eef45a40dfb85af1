from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import nadhooks
from nadhooks import sharing
from nadhooks.errors import MaskFileError, NadhooksError, RenderError
from nadhooks.masks import Masks
from nadhooks.sites import Site
from nadhooks.tasks import LONGEST, TEXT, Tasks

from .hub import NOWHERE, Hub, serving
from .nets import Line

ORIGIN = {
    "model": "timm:resnet50",
    "data": "/home/somebody/private/flowers",
    "method": "contrastive",
    "options": {"steps": 180, "momentum": 0.8},
    "keep": 0.55,
    "sites": ["layer?.*"],
    "libraries": {"torch": "2.15.0"},
}
HOSTILE = [
    "a|b",
    "`code` ``` `",
    "\\",
    "\\|",
    "line\nbreak\r\n\n# heading",
    "<script>alert(1)</script>",
    "![x](http://evil.example/x.png)",
    "[click](javascript:alert(1))",
    "https://evil.example www.evil.example me@evil.example",
    "www.evil.example",
    "__init__ **bold** ~~no~~ $x$",
    "&lt;b&gt; &#60;",
    "\u202eevil\u2066 \u200b",
    "---",
    "- item",
    "1. item",
    "",
    " ",
    "a\x00b\x1b[31m",
    "{{ template }} {% raw %}",
    "\ud800",
    "x" * 5000,
    "`" * 400,
]


def masks(names: list[str], origin: dict[str, Any] | None = None, **quality: list[float]) -> Masks:
    """Of three units, of which task i keeps the first i % 4."""
    sites = (Site("a", 1, 3, "a"),)
    wiring = nx.freeze(nx.DiGraph([("input", "a"), ("a", "output")]))
    kept = torch.tensor([[float(unit < row % 4) for unit in range(3)] for row in range(len(names))])
    measured = {name: torch.tensor(values) for name, values in quality.items()}
    tasks = Tasks.of(dict(enumerate(names)))
    return Masks(sites, {"a": kept}, tasks, wiring, provenance=origin or {}, quality=measured)


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def rendered(card: str) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card.split("\n---\n", 1)[1])


def cells(html: str) -> list[list[str]]:
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", html, re.S)]


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_front_matter_names_library_base_model_and_licence() -> None:
    card = sharing.model_card(masks(["x"], ORIGIN), "us/r", license="cc-by-4.0")
    tags = ["nadhooks", "interpretability", "vision"]
    expected = {
        "library_name": "nadhooks",
        "license": "cc-by-4.0",
        "base_model": "timm/resnet50.a1_in1k",
        "tags": tags,
    }
    assert front(card) == expected
    assert ModelCard(card).data.to_dict() == expected  # the Hub's client reads the same
    assert front(sharing.model_card(masks(["x"]), "us/r")) == {"library_name": "nadhooks", "tags": tags}


@pytest.mark.parametrize(
    ("model", "more", "expected"),
    [
        ("timm:resnet50", {}, "timm/resnet50.a1_in1k"),
        ("timm:resnet50.a1_in1k", {"trained": "pretrained"}, "timm/resnet50.a1_in1k"),
        ("timm:resnet50", {"trained": "mine.safetensors"}, None),
        ("timm:resnet50,num_classes=10", {}, None),
        ("timm:darknet17", {}, None),  # timm has no weights of it
        ("timm:no_such_model", {}, None),
        ("timm:resnet50.no_such_tag", {}, None),
        ("torchvision:resnet50", {}, None),
        ("net.py:build", {}, None),
        ("", {}, None),
    ],
)
def test_the_base_model_is_timms_where_the_weights_may_be(model: str, more: dict[str, str], expected: str) -> None:
    found = masks(["x"], {"model": model, **more})
    assert front(sharing.model_card(found, "us/r")).get("base_model") == expected
    assert front(sharing.model_card(found, "us/r", base_model="us/net"))["base_model"] == "us/net"
    assert "base_model" not in front(sharing.model_card(found, "us/r", base_model=""))


def test_the_table_has_a_row_for_each_task_and_the_means() -> None:
    card = sharing.model_card(
        masks(
            ["tench", "cock"],
            {"quality": {"images": 1200, "network": {"recall": 0.99, "fpr": "none"}}},
            recall=[0.9, 1.0],
            fpr=[0.25, float("nan")],
        ),
        "us/r",
    )
    assert cells(rendered(card)) == [
        ["task", "label", "kept", "recall", "false positives"],
        ["tench", "0", "0 %", "0.900", "0.250"],
        ["cock", "1", "33 %", "1.000", "–"],
        ["<strong>mean of 2</strong>", "", "17 %", "0.950", "0.250"],
        ["<strong>full network</strong>", "", "100 %", "0.990", ""],
    ]
    assert "measured the other figures on 1,200 images, with" in card
    assert "Recall alone proves nothing" in card
    bare = sharing.model_card(masks(["tench"]), "us/r")
    assert cells(rendered(bare))[0] == ["task", "label", "kept"]
    assert "does not say how well" in bare


def test_a_thousand_tasks_make_a_card_of_a_hundred_rows() -> None:
    card = sharing.model_card(masks([f"class {i}" for i in range(1000)]), "us/r")
    assert len(cells(rendered(card))) == 1 + 100 + 1
    assert "**mean of 1,000**" in card
    assert "shows 100 of 1,000 tasks" in card


def test_the_card_says_how_the_masks_were_learnt_but_not_where_files_lie() -> None:
    card = sharing.model_card(masks(["x"], ORIGIN), "us/r")
    for line in ("model: `timm:resnet50`", "data: flowers", "method: contrastive", "sites: `layer?.*`", "keep: 0.55",
                 "options: steps 180, momentum 0.8", "libraries: torch 2.15.0"):  # fmt: skip
        assert f"\n- {line}\n" in card
    assert "somebody" not in card
    assert "somebody" not in sharing.model_card(masks(["x"], {"model": "/home/somebody/net.py:build"}), "us/r")


def test_the_card_cites_the_paper_and_what_the_network_comes_from() -> None:
    timm = sharing.model_card(masks(["x"], ORIGIN), "us/r")
    assert "Architecture Disentanglement for Deep Neural Networks" in timm
    assert "PyTorch Image Models" in timm
    assert "https://huggingface.co/timm/resnet50.a1_in1k" in timm
    torchvision = sharing.model_card(masks(["x"], {"model": "torchvision:resnet50"}), "us/r")
    assert "TorchVision" in torchvision
    assert sharing.model_card(masks(["x"]), "us/r").count("```bibtex") == 1


def test_the_cards_code_loads_the_masks_and_puts_them_into_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = Line().eval(), torch.randn(2, 2, 6, 6)
    gates = nadhooks.attach(model, "act?", tasks={7: "seven", 8: "eight"}, example=images)
    gates.logits["act2"].data[0, 1:] = 0
    expected, learnt = gates.masks(), gates.masks()
    with gates("seven"):
        outputs = model(images)
    gates.detach()
    monkeypatch.setattr(nadhooks, "load", {"hf://us/r/a.safetensors": learnt}.__getitem__)
    monkeypatch.setattr("nadhooks.zoo.load_model", lambda spec, *, weights: model if spec == "timm:x,a=(1,2)" else None)
    for origin in ({"model": "timm:x,a=(1,2)"}, {}):
        card = sharing.model_card(expected.replaced(expected.values, provenance=origin), "us/r", file="a.safetensors")
        code = card.split("```python\n")[1].split("```")[0]
        named: dict[str, Any] = {"images": images}
        code = code.replace(
            "nadhooks.attach(model, masks.sites)", "nadhooks.attach(model, masks.sites, example=images)"
        )
        if not origin:
            assert "model = …  # the network" in code
            named["given"], code = model, code.replace("model = …", "model = given")
        exec(code, named)
        assert torch.equal(named["outputs"], outputs)
        named["gates"].detach()


def test_hostile_names_stay_text_in_the_card() -> None:
    names = [name for name in HOSTILE if name and len(name) <= LONGEST and TEXT.fullmatch(name)]  # others are no tasks
    assert len(names) > 15
    for value in HOSTILE:
        origin = {"model": value, "data": value, "options": {value: value}, "sites": [value], "libraries": {value: 1}}
        card = sharing.model_card(masks(names, origin), "us/r")
        card.encode()
        html = rendered(card)
        assert front(card) == {"library_name": "nadhooks", "tags": ["nadhooks", "interpretability", "vision"]}
        known = "h1 h2 p pre code em strong table thead tbody tr th td ul li"
        assert set(re.findall(r"<(\w+)", html)) == set(known.split())
        assert [len(row) for row in cells(html)] == [3] * (len(names) + 2)
        assert html.count("<h1>") == 1
        assert html.count("<h2>") == 4
        assert html.count("<li>") == 6
        assert not any(character in card for character in "\u202e\u2066\u200b\x00\x1b\ud800")
        plain = re.sub(r"<code[^>]*>.*?</code>", "", html, flags=re.S)
        assert "evil" not in plain  # where a renderer that makes links of addresses would find it


def test_text_survives_rendering_whatever_it_is() -> None:
    random.seed(0)
    alphabet = "ab1 _*`|\\<>&[]()!#-+.~$:/@%'\",\n\t\u202e\u00e9\u6c34\u0301"
    for _ in range(300):
        value = "".join(random.choices(alphabet, k=random.randint(0, 12)))
        html = MarkdownIt("commonmark").enable("table").render(f"| x {sharing.text(value)} | y |\n|---|---|\n| a | b |")
        assert [len(row) for row in cells(html)] == [2, 2], value
        assert set(re.findall(r"<(\w+)", html)) <= {"table", "thead", "tbody", "tr", "th", "td", "code"}, value
        if not set(value) & set("`|\n\t\u202e") and value.strip():
            seen = re.sub("</?code>", "", cells(html)[0][0]).removeprefix("x ")
            for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
                seen = seen.replace(entity, character)
            assert seen.strip() == value.strip()


def test_what_would_stand_in_code_and_links_is_checked() -> None:
    for repo in ("r", "us/r/x", "us/r)", "us/r\n", "üs/r"):
        with pytest.raises(MaskFileError, match="expected a repository of the Hub"):
            sharing.model_card(masks(["x"]), repo)
    for file in ("masks.bin", "../masks.safetensors", "/masks.safetensors", "a b.safetensors", 'a".safetensors'):
        with pytest.raises(MaskFileError, match=r"expected a file name that ends in \.safetensors"):
            sharing.model_card(masks(["x"]), "us/r", file=file)
    for licence in ("a\n---\n# b", "[a]", "a: b"):
        with pytest.raises(MaskFileError, match=r"license: expected an identifier such as apache-2\.0"):
            sharing.model_card(masks(["x"]), "us/r", license=licence)
    with pytest.raises(MaskFileError, match="base_model: expected a repository"):
        sharing.model_card(masks(["x"]), "us/r", base_model="x](y)")


# --- publishing ------------------------------------------------------------------------------------------------------


def test_masks_are_published_with_card_and_pictures_and_come_back(hub: Hub) -> None:
    ours = masks(["tench", "cock"], ORIGIN)
    address = ours.push_to_hub("us/r", license="mit", private=True)
    repo = hub.repos["us/r"]
    files = repo.commits[repo.refs["main"]]
    assert set(files) == {".gitattributes", "masks.safetensors", "README.md", "flow.png", "flow.svg"}
    assert files["flow.png"].startswith(b"\x89PNG")
    assert files["README.md"].decode() == sharing.model_card(ours, "us/r", license="mit", picture="flow.png")
    assert repo.messages == ["initial", f"Masks of 2 tasks, by nadhooks {nadhooks.__version__}"]
    assert nadhooks.load(address) == nadhooks.load("hf://us/r") == ours


def test_masks_may_have_a_file_name_of_their_own_and_leave_the_card_alone(hub: Hub) -> None:
    first, second = masks(["a"]), masks(["a", "b"])
    first.push_to_hub("hf://us/r", card="# Mine\n")
    address = second.push_to_hub("us/r", file="more/b.masks.safetensors", card="", message="b")
    files = hub.repos["us/r"].commits[hub.repos["us/r"].refs["main"]]
    assert files["README.md"] == b"# Mine\n"
    assert address.endswith("/more/b.masks.safetensors")
    assert nadhooks.load(address) == nadhooks.load("hf://us/r/more/b.masks.safetensors") == second
    assert nadhooks.load("hf://us/r") == first


def test_without_a_renderer_masks_are_published_without_pictures(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(graph: object, path: Path) -> None:
        raise RenderError("too many sites")

    monkeypatch.setattr(sharing, "render", missing)
    with pytest.warns(UserWarning, match=r"^flow\.png and flow\.svg are left out: too many sites$"):
        masks(["a"]).push_to_hub("us/r")
    files = hub.repos["us/r"].commits[hub.repos["us/r"].refs["main"]]
    assert set(files) == {".gitattributes", "masks.safetensors", "README.md"}
    assert b"![" not in files["README.md"]


def test_what_cannot_be_published_is_refused_before_anything_is_sent(hub: Hub) -> None:
    with pytest.raises(NadhooksError, match="expected Masks, got str"):
        sharing.push_to_hub("masks.safetensors", "us/r")  # type: ignore[arg-type]
    with pytest.raises(MaskFileError, match="expected a repository of the Hub"):
        masks(["a"]).push_to_hub("r")
    assert hub.log == []


def test_files_that_are_no_masks_are_refused_by_their_address(hub: Hub) -> None:
    hub.made("us/r", {"masks.safetensors": b"no"})
    hub.web["a"] = (200, {}, b"<html>")
    for address in ("hf://us/r", f"{hub.url}/web/a", "hf://us/none", "s3:///"):
        with pytest.raises(MaskFileError, match=f"^{re.escape(address)}: "):
            nadhooks.load(address)
    good = masks(["a"])
    good.push_to_hub("us/good", card="")
    hub.web["good"] = (200, {}, hub.repos["us/good"].commits[hub.repos["us/good"].refs["main"]]["masks.safetensors"])
    assert nadhooks.load(f"{hub.url}/web/good") == good


# --- as a user does --------------------------------------------------------------------------------------------------


def test_published_in_one_process_masks_load_in_others(tmp_path: Path) -> None:
    ours = masks(["tench", "cock"], ORIGIN)
    ours.save(tmp_path / "ours.safetensors")
    push = (
        "import nadhooks; masks = nadhooks.load('ours.safetensors')\n"
        "print(masks.push_to_hub('us/r', license='mit'))\n"
        "print(masks.select('cock').push_to_hub('us/r', license='mit'))"
    )

    def run(*arguments: str, home: str, **environment: str) -> subprocess.CompletedProcess[str]:
        known = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        known |= {
            "HF_HOME": str(tmp_path / home),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(nadhooks.__file__).parent.parent),
            **environment,
        }
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=known, capture_output=True, text=True, check=False
        )

    with serving(Hub()) as hub:
        published = run("-c", push, home="theirs", HF_ENDPOINT=hub.url, HF_TOKEN="hf_writer")
        assert (published.returncode, published.stderr) == (0, "")
        first = published.stdout.split()[0]
        load = (
            f"import nadhooks\nmasks = nadhooks.load('{first}')\nassert masks == nadhooks.load('ours.safetensors')\n"
            "print(nadhooks.load('hf://us/r').tasks)"
        )
        loaded = run("-c", load, home="mine", HF_ENDPOINT=hub.url)
        assert (loaded.returncode, loaded.stderr, loaded.stdout) == (0, "", "('cock',)\n")
        refused = run("-m", "nadhooks", "inspect", "hf://us/r@v2", home="mine", HF_ENDPOINT=hub.url)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr == "nadhooks: error: hf://us/r@v2: us/r has no revision 'v2'\n"
    offline = run("-c", load, home="mine", HF_ENDPOINT=NOWHERE, HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stderr, offline.stdout) == (0, "", "('cock',)\n")
    begun = time.monotonic()
    away = run("-m", "nadhooks", "inspect", "hf://us/r", home="new", HF_ENDPOINT=NOWHERE)
    assert away.returncode == 1
    assert away.stderr.startswith(f"nadhooks: error: hf://us/r: {NOWHERE} cannot be reached (")
    assert away.stderr.count("\n") == 1
    assert time.monotonic() - begun < 20  # most of it for importing torch; huggingface_hub alone would try for 23 s
