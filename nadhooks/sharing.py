"""Publishing masks: a model card, a picture, and both of them with the mask file on the Hugging Face Hub."""

from __future__ import annotations

import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from . import zoo
from ._version import __version__
from .collapsing import collapse
from .errors import MaskFileError, RenderError
from .flow import flow_graph
from .formats import hub
from .masks import Masks, check_masks
from .rendering import render

PICTURES = ("flow.png", "flow.svg")  # the first that can be drawn stands in the card
TASKS_SHOWN = 100
MEASURES = {"recall": "recall", "fpr": "false positives", "auc": "AUC", "fpr95": "false positives at recall 95 %"}
LONGEST = 120  # characters of a name that somebody made up
CITATIONS = {
    "": """@inproceedings{hu2021architecture,
  title     = {Architecture Disentanglement for Deep Neural Networks},
  author    = {Hu, Jie and Cao, Liujuan and Tong, Tong and Ye, Qixiang and Zhang, Shengchuan and Li, Ke and Huang, Feiyue and Shao, Ling and Ji, Rongrong},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  pages     = {672--681},
  year      = {2021}
}""",  # noqa: E501
    "timm": """@misc{wightman2019timm,
  title  = {PyTorch Image Models},
  author = {Wightman, Ross},
  year   = {2019},
  doi    = {10.5281/zenodo.4414861},
  url    = {https://github.com/huggingface/pytorch-image-models}
}""",
    "torchvision": """@misc{torchvision2016,
  title  = {TorchVision: PyTorch's Computer Vision library},
  author = {{TorchVision maintainers and contributors}},
  year   = {2016},
  url    = {https://github.com/pytorch/vision}
}""",
}


def push_to_hub(
    masks: Masks,
    repo: str,
    *,
    file: str = hub.FILE,
    license: str | None = None,
    base_model: str | None = None,
    card: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
) -> str:
    """Publishes masks in the repository `org/name` of the Hugging Face Hub; returns the address for `nadhooks.load`.

    One commit holds the mask file, a card (README.md, in place of an older one) and pictures of the flow (flow.png and
    flow.svg; where they cannot be read, a warning says why). The address, hf://org/name@commit, gives these very masks
    for ever.

    file: the mask file's name; `hf://org/name` finds the default. license: an identifier that the Hub knows, such as
    "apache-2.0"; the masks' publisher decides. base_model: as for `model_card`. card: the text of the README, by
    default `model_card(...)`; "" leaves README and pictures in the repository as they are.
    private: of a new repository; None is what the organisation has set. token: by default that of `hf auth login` or
    HF_TOKEN. revision: an existing branch. create_pr: propose the commit as a pull request.

    Raises MaskFileError where the Hub says no or cannot be reached.
    """
    check_masks(masks)
    repo = _checked(repo, file)
    with TemporaryDirectory() as folder:
        masks.save(Path(folder) / "masks")
        files = {file: (Path(folder) / "masks").read_bytes()}
        if card != "":
            pictures = _pictures(masks, Path(folder))
            if card is None:
                shown = next(iter(pictures), None)
                card = model_card(masks, repo, file=file, license=license, base_model=base_model, picture=shown)
            files |= {"README.md": card.encode(), **pictures}
    message = message or f"Masks of {len(masks)} tasks, by nadhooks {__version__}"
    options = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
    address = hub.upload(repo, files, message=message, **options)  # type: ignore[arg-type]
    return address if file == hub.FILE else f"{address}/{file}"


def model_card(
    masks: Masks,
    repo: str,
    *,
    file: str = hub.FILE,
    license: str | None = None,
    base_model: str | None = None,
    picture: str | None = None,
) -> str:
    """A model card in Markdown, for a repository `org/name` that holds the masks as `file`.

    base_model: the Hub's repository of the network, by default timm's where the masks say that they belong to
    `timm:NAME` without options, and do not say (in provenance["trained"]) that its weights are others; "" for none.
    picture: the name of an image beside it. Whatever stands in the masks, names of tasks say, stays text: no Markdown,
    HTML or YAML in it takes effect.
    """
    repo = _checked(repo, file)
    origin = masks.provenance
    spec = str(origin.get("model", ""))
    own = origin.get("trained", "pretrained") == "pretrained"  # the zoo's, as far as the masks know
    if base_model is None:
        base_model = zoo.hub_id(spec) if own else None
    elif base_model and not hub.NAME.fullmatch(base_model):
        raise MaskFileError(f"base_model: expected a repository of the Hub, org/name, got {base_model!r}")
    if license and not re.fullmatch(r"[\w.-]+", license):
        raise MaskFileError(f"license: expected an identifier such as apache-2.0, got {license!r}")
    network = _network(spec, base_model)
    parts = [
        _front_matter(license, base_model),
        f"# Masks of {network}" if network else "# Masks",
        f"Which units {network or 'a network'} needs for each of {len(masks):,} "
        f"task{'s' if len(masks) != 1 else ''}: masks over {masks.units:,} units of {len(masks.sites):,} sites, learnt "
        "and written by nadhooks (neural architecture disentanglement).",
    ]
    if picture:
        parts.append(f"![The information flow through the network, all tasks over each other]({picture})")
    parts += ["## How to load", _code(repo, file, spec, own), "## Tasks", _tasks(masks), "## How they were learnt"]
    parts += [_origin(masks), "## Citation", "The method:", f"```bibtex\n{CITATIONS['']}\n```"]
    zoo_name = spec.partition(":")[0]
    if base_model:
        parts.append(f"The network: see [{base_model}](https://huggingface.co/{base_model}).")
    if zoo_name in CITATIONS and zoo_name:
        parts += ["The library that it comes from:", f"```bibtex\n{CITATIONS[zoo_name]}\n```"]
    return "\n\n".join(parts) + "\n"


def text(value: object) -> str:
    """Anything as text that Markdown, HTML and tables leave alone, on one line and of bounded length.

    Plain words stay plain. Everything else becomes a code span, where neither has a say, with the characters that
    could end it or hide something (backticks, pipes, control and direction characters) as \\uXXXX.
    """
    words = str(value)
    words = words if len(words) <= LONGEST else f"{words[: LONGEST - 1]}…"
    # www. would become a link, and a space at an end disappear
    if re.fullmatch(r"[\w.](?:[\w ,.'%-]*[\w.%])?", words) and "_" not in words and "www." not in words.lower():
        return words
    shown = "".join(_escaped(each) for each in words)
    return f"`{shown}`" if shown.strip() else '`""`'


# --- the parts of a card ---------------------------------------------------------------------------------------------


def _front_matter(license: str | None, base_model: str | None) -> str:
    data: dict[str, Any] = {"library_name": "nadhooks", "tags": ["nadhooks", "interpretability", "vision"]}
    data |= {"license": license} if license else {}
    data |= {"base_model": base_model} if base_model else {}
    return hub.front_matter(**data)


def _network(spec: str, base_model: str | None) -> str:
    if base_model:
        return f"[{base_model}](https://huggingface.co/{base_model})"
    source, _, name = spec.partition(":")
    return text(_without_folders(source) + (f":{name}" if name else "")) if spec else ""


def _code(repo: str, file: str, spec: str, own: bool) -> str:
    """How to get the masks, and how to put them into the network."""
    address = f"hf://{repo}" if file == hub.FILE else f"hf://{repo}/{file}"
    lines = ["import nadhooks", "", f'masks = nadhooks.load("{address}")', "print(masks.tasks, masks.kept())"]
    known = re.fullmatch(r"(?:timm|torchvision):[\w.-]+(,[\w=.(),-]*)?", spec)
    if known and len(spec) <= LONGEST:
        weights = "pretrained=True" if own and not known[1] else 'weights="…"'
        lines[0] = "import nadhooks\nfrom nadhooks.zoo import load_model"
        model = f'load_model("{spec}", {weights})  # the weights that the masks were learnt on'
    else:
        model = "…  # the network that the masks were learnt on"
    lines += ["", f"model = {model}", "gates = nadhooks.attach(model, masks.sites)", "gates.load(masks)"]
    lines += ["with gates(masks.labels[0]):  # only the units that the first task needs", "    outputs = model(images)"]
    return "```python\n" + "\n".join(lines) + "\n```"


def _tasks(masks: Masks) -> str:
    """A table with one row for each task, and the means."""
    quality = masks.quality
    measures = [name for name in MEASURES if name in quality]
    measures += [name for name in quality if name not in (*MEASURES, "kept")]

    def row(*names: str, kept: str, figures: Callable[[Tensor], Tensor]) -> list[str]:
        return [*names, kept, *(_figure(figures(quality[name])) for name in measures)]

    kept = masks.kept()
    rows = [["task", "label", "kept", *(MEASURES.get(name) or text(name) for name in measures)]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for index, (name, label) in enumerate(list(zip(masks.tasks, masks.labels, strict=True))[:TASKS_SHOWN]):
        rows.append(row(text(name), text(label), kept=_share(kept[index]), figures=itemgetter(index)))
    rows.append(row(f"**mean of {len(masks):,}**", "", kept=_share(kept.mean()), figures=_mean))
    stated = masks.provenance.get("quality")
    network = stated.get("network") if isinstance(stated, Mapping) else None
    if isinstance(network, Mapping) and any(isinstance(network.get(name), (int, float)) for name in measures):
        full = [network.get(name) for name in measures]
        shares = [isinstance(value, (int, float)) and 0 <= value <= 1 for value in full]  # a stranger may have any
        shown = [_figure(torch.tensor(value)) if share else "" for value, share in zip(full, shares, strict=True)]
        rows.append(["**full network**", "", "100 %", *shown])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    if len(masks) > TASKS_SHOWN:
        table += f"\n\nThe table shows {TASKS_SHOWN} of {len(masks):,} tasks; the file holds all, and so do the means."
    return f"{table}\n\n{_reading(bool(measures), stated.get('images') if isinstance(stated, Mapping) else None)}"


def _reading(measured: bool, images: object) -> str:
    kept = "*kept* is the share of the units that the mask keeps."
    if not measured:
        return f"{kept} The file does not say how well they work alone."
    where = f" on {images:,} images" if isinstance(images, int) else ""
    return (
        f"{kept} The publisher measured the other figures{where}, with all other units closed. Recall alone proves "
        "nothing: a sub-architecture that answers its class to everything has recall 1, and a false-positive rate of 1 "
        "beside it."
    )


def _origin(masks: Masks) -> str:
    """What the masks say of where they come from, as a list."""
    origin = dict(masks.provenance)
    named = (
        "model", "trained", "weights", "data", "method", "options", "keep", "fidelity", "start", "autocast", "seed",
        "sites", "nadhooks", "libraries",
    )  # fmt: skip
    lines = [
        f"- {key}: {text(_value(origin[key]))}" for key in named if origin.get(key) is not None and origin[key] != {}
    ]
    kinds = {"zero": "zero", "mean": "its mean over the data", "optimal": "a constant learnt for each task"}
    closed = kinds[masks.closed]
    return "\n".join([*lines, f"- what a closed unit puts out: {closed}"])


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(each) for each in value)
    return _without_folders(str(value))


# --- pieces ----------------------------------------------------------------------------------------------------------


def _checked(repo: str, file: str) -> str:
    """Both stand in the card's code and links as they are."""
    name = str(repo).removeprefix(hub.SCHEME)
    if not hub.NAME.fullmatch(name) or not name.isascii():
        raise MaskFileError(f"expected a repository of the Hub, org/name, got {repo!r}")
    if not re.fullmatch(r"[A-Za-z0-9_][\w./-]*\.safetensors", file, re.ASCII) or ".." in file:
        raise MaskFileError(f"expected a file name that ends in .safetensors, got {file!r}")
    return name


def _pictures(masks: Masks, folder: Path) -> dict[str, bytes]:
    """The flow of all tasks over each other; of a network too large to be read, its collapsed view."""
    graph = flow_graph(masks)
    for shown in (lambda: graph, lambda: collapse(graph)):
        try:
            for name in PICTURES:
                render(shown(), folder / name)
            return {name: (folder / name).read_bytes() for name in PICTURES}
        except RenderError as error:
            why = error
    warnings.warn(f"{' and '.join(PICTURES)} are left out: {why}", stacklevel=4)  # above `Masks.push_to_hub`
    return {}


def _figure(value: Tensor) -> str:
    return f"{float(value):.3f}" if math.isfinite(float(value)) else "–"


def _share(value: Tensor) -> str:
    return f"{100 * float(value):.0f} %"


def _mean(values: Tensor) -> Tensor:
    return values.double().nanmean()


def _without_folders(value: str) -> str:
    """The folders of a path on the publisher's machine are nobody's business."""
    return PurePath(value).name if PurePath(value).is_absolute() or value.startswith("~") else value


def _escaped(character: str) -> str:
    unseen = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    if character in "`|" or unseen:
        return f"\\u{ord(character):04x}"
    return character
