"""The only file that knows timm and torchvision by name: models, their inputs and their transforms."""

from __future__ import annotations

import ast
import inspect
import re
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Transform
from ..errors import ModelError
from ..formats.hub import without_waiting
from .files import imports_beside, load_weights, module_from, own_transform


def load_model(spec: str, *, weights: str | None = None, pretrained: bool = False) -> nn.Module:
    """A model in eval mode from `timm:NAME`, `torchvision:NAME` or `file.py:factory`.

    Keyword arguments for the constructor may follow the name: `timm:resnet18,num_classes=10,in_chans=1`.
    weights: a safetensors file or a state_dict, loaded with `weights_only=True`. pretrained: from timm's or
    torchvision's hub. Raises ModelError.
    """
    source, _, rest = spec.partition(":")
    name, _, settings = rest.partition(",")
    if not name:
        raise ModelError(f"expected timm:NAME, torchvision:NAME or file.py:factory, got {spec!r}")
    options = _options(settings)
    if source == "timm":
        model = _timm_model(name, pretrained, options)
    elif source == "torchvision":
        model = _torchvision_model(name, pretrained, options)
    elif source.endswith(".py"):
        if pretrained:
            raise ModelError(
                "pretrained weights exist for timm: and torchvision: models; pass the weights' file instead"
            )
        factory = getattr(module_from(source), name, None)
        with imports_beside(source):
            model = _call(spec, factory, options)
    else:
        raise ModelError(f"expected timm:NAME, torchvision:NAME or file.py:factory, got {spec!r}")
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} made a {type(model).__name__}, expected a torch.nn.Module")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def is_plain(spec: str) -> bool:
    """Whether a model of timm or torchvision is meant, with numbers for options: what a stranger may ask for.

    A file runs code; words among the options may name files, and names with a colon or slash repositories.
    """
    source, _, rest = spec.partition(":")
    name, _, settings = rest.partition(",")
    try:
        values = list(_options(settings).values())
    except ModelError:
        return False
    flat = [each for value in values for each in (value if isinstance(value, (list, tuple)) else [value])]
    known = source in ("timm", "torchvision") and re.fullmatch(r"[\w.-]+", name) is not None
    return known and all(value is None or isinstance(value, (bool, int, float)) for value in flat)


def example_for(model: nn.Module, size: int | None = None) -> Any:
    """Forward arguments of one sample as the model itself describes them, on its device.

    Images (1, channels, height, width), clips (1, 3, 16, height, width), two images for optical flow, a list with one
    (3, height, width) image for detection. size: height and width, where the model takes any.
    Raises ModelError for models of neither zoo that say nothing about their input.
    """
    inner = _unwrapped(model)
    family = _torchvision_family(inner)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)  # the global random state is the user's

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=like.device, dtype=like.dtype)

    if detects(model):
        return ([noise(3, size or 256, size or 256).sigmoid()],)
    if family == "optical_flow":  # its correlation pyramid needs 128
        return (noise(1, 3, size or 128, size or 128), noise(1, 3, size or 128, size or 128))
    known = _input_size(model)
    if known is None:
        raise ModelError(
            f"nothing tells what input {type(model).__name__} takes; pass example=, the forward arguments "
            "(a tensor, a tuple or a dict), for instance example=images[:1]"
        )
    channels, height, width = known
    clip = (16,) if family == "video" else ()
    return noise(1, channels, *clip, size or height, size or width)


def detects(model: nn.Module) -> bool:
    """Takes lists of images, in training with targets, and puts out boxes."""
    return _torchvision_family(_unwrapped(model)) == "detection"


def training_example(model: nn.Module, example: Any) -> Any:
    """What the model takes in training: detection wants targets too, other models take the same."""
    if not detects(model):
        return example
    targets = []
    for image in example[0]:
        side = min(image.shape[1:])
        box = torch.tensor([[0.2, 0.2, 0.8, 0.9]], device=image.device) * side
        targets.append(
            {
                "boxes": box,
                "labels": torch.ones(1, dtype=torch.int64, device=image.device),
                "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8, device=image.device),
                "keypoints": torch.cat([box.new_full((1, 17, 2), 0.5 * side), box.new_ones(1, 17, 1)], 2),
            }
        )
    return (*example, targets)


def model_names() -> dict[str, str]:
    """{spec: the module that defines it} of every model in both zoos."""
    import timm
    from torchvision import models

    named = {f"timm:{name}": timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    return named | {f"torchvision:{name}": models.get_model_builder(name).__module__ for name in models.list_models()}


def hub_id(spec: str) -> str | None:
    """The Hugging Face Hub's repository of a timm model's own weights, `org/name`; None for any other model.

    `timm:NAME` with keyword arguments is another model: the weights do not fit it, or not all of them.
    """
    source, _, name = spec.partition(":")
    if source != "timm" or "," in name:
        return None
    import timm

    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    except RuntimeError:  # the model has no weights of that tag
        return None
    return config.hf_hub_id if config is not None and config.hf_hub_id else None


def versions() -> dict[str, str]:
    import timm
    import torchvision

    return {"torch": str(torch.__version__), "timm": timm.__version__, "torchvision": torchvision.__version__}


def set_image_size(model: nn.Module, size: int) -> None:
    """Has `example_for` and `transform_for` use square images of another size.

    Raises ModelError for models that take one size only, as most vision transformers do.
    """
    model = _unwrapped(model)
    known = _input_size(model)
    patches = getattr(model, "patch_embed", None)  # timm's transformers; torchvision's say `image_size`
    one_size = getattr(patches, "strict_img_size", False) or isinstance(getattr(model, "image_size", None), int)
    if known and one_size and known[1:] != (size, size):
        option = "timm:NAME,img_size" if patches is not None else "torchvision:NAME,image_size"
        raise ModelError(
            f"expected images of {known[1]} x {known[2]}, which this model was made for, got {size}; "
            f"make it for that size: {option}={size}"
        )
    config = getattr(model, "pretrained_cfg", None)
    config = dict(config) if isinstance(config, dict) else {}
    size_now = {"input_size": (known[0] if known else 3, size, size), "fixed_input_size": False}
    model.pretrained_cfg = config | size_now  # type: ignore[assignment]


def transform_for(model: nn.Module, spec: str = "") -> Transform:
    """The evaluation transform (image -> (channels, height, width)) that belongs to a model.

    timm's `resolve_data_config`, torchvision's weights' transforms, or the function `transform` of `file.py:factory`.
    """
    own = own_transform(spec)
    if own is not None:
        return own
    size = _input_size(model)
    if size is None:
        source = spec.partition(":")[0]
        raise ModelError(
            f"nothing tells how images become inputs of this model; define a function `transform` in {source}"
        )
    from torchvision import transforms

    channels = transforms.Grayscale(1) if size[0] == 1 else transforms.Lambda(_in_colour)
    if hasattr(model, "pretrained_cfg"):
        import timm

        config = timm.data.resolve_data_config(model=model) | {"input_size": size}
        if size[0] == 1:
            config |= {key: (sum(config[key]) / len(config[key]),) for key in ("mean", "std")}
        return transforms.Compose([channels, timm.data.create_transform(**config, is_training=False)])
    weights = _torchvision_weights(model, spec.partition(":")[2].partition(",")[0])
    preset = (
        weights.transforms()
        if weights is not None
        else transforms.Compose([transforms.Resize(size[1:]), transforms.ToTensor()])
    )
    return transforms.Compose([channels, preset])


def _in_colour(image: Any) -> Any:  # a function, not a lambda: loading processes may have to pickle it
    return image.convert("RGB")


def class_index_of(model: nn.Module) -> dict[str, int]:
    """{class name or WordNet id: output index} where the zoo knows them (ImageNet's 1,000 classes), else empty."""
    weights = _torchvision_weights(model, "")
    names = weights.meta.get("categories", []) if weights is not None else []
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if layers and names and layers[-1].weight.shape[0] != len(names):  # torchvision:NAME,num_classes=3
        return {}
    if not names and getattr(model, "num_classes", None) == 1000:  # timm says no names; the order is ImageNet's
        from torchvision.models import ResNet18_Weights

        names = ResNet18_Weights.DEFAULT.meta["categories"]
    known = {name: index for index, name in enumerate(names)}
    if len(names) == 1000:
        from timm.data import ImageNetInfo

        known |= {wordnet: index for index, wordnet in enumerate(ImageNetInfo().label_names())}
    return known


def _timm_model(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise ModelError(f"timm has no model {name!r}{_did_you_mean(name, timm.list_models())}")
    with without_waiting() if pretrained else nullcontext():
        return _call(f"timm:{name}", timm.create_model, {"model_name": name, "pretrained": pretrained} | options)


def _torchvision_model(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    from torchvision import models

    if name not in models.list_models():
        raise ModelError(f"torchvision has no model {name!r}{_did_you_mean(name, models.list_models())}")
    chosen: dict[str, Any] = {"name": name, "weights": "DEFAULT" if pretrained else None}
    if not pretrained and "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        chosen["weights_backbone"] = None  # else detection and segmentation download their backbone's
    if name in ("googlenet", "inception_v3") and not pretrained:
        chosen["init_weights"] = True  # says nothing new, but silences a warning about a future default
    return _call(f"torchvision:{name}", models.get_model, chosen | options)


def _call(spec: str, factory: Any, options: dict[str, Any]) -> Any:
    if not callable(factory):
        raise ModelError(f"{spec}: there is no such function")
    try:
        return factory(**options)
    except (Exception, SystemExit) as error:  # constructors and downloads raise anything
        if isinstance(error, OSError) and (options.get("pretrained") or options.get("weights")):
            why = str(error).partition(". ")[0]  # of a paragraph
            raise ModelError(
                f"{spec}: its pretrained weights cannot be fetched: {why}; check the connection, or pass weights=FILE"
            ) from error
        raise ModelError(f"{spec} cannot be made: {type(error).__name__}: {error}") from error


def _options(text: str) -> dict[str, Any]:
    """`num_classes=10,channels=(32,64)` as keyword arguments; words without quotes are strings."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not all(word.arg for word in call.keywords):
            raise ValueError("not keyword arguments")
        return {
            str(word.arg): word.value.id if isinstance(word.value, ast.Name) else ast.literal_eval(word.value)
            for word in call.keywords
        }
    except (SyntaxError, ValueError) as error:
        raise ModelError(f"expected key=value,key=value behind the model's name, got {text!r}") from error


def _did_you_mean(name: str, names: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, names, 3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) that the model takes, from what it says of itself."""
    inner = _unwrapped(model)
    config = getattr(inner, "pretrained_cfg", None)
    size: tuple[int, int] | None = None
    if isinstance(config, dict) and config.get("input_size"):
        size = tuple(config["input_size"])[1:]
        built_for = getattr(getattr(inner, "patch_embed", None), "img_size", None)  # timm.create_model(img_size=…)
        size = tuple(built_for) if built_for and config.get("fixed_input_size", True) else size
    elif _torchvision_family(inner):
        built_for = getattr(inner, "image_size", None)
        weights = _torchvision_weights(inner, "")
        preset = weights.transforms() if weights is not None else None
        crop = getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None)  # segmentation only resizes
        size = (built_for, built_for) if isinstance(built_for, int) else (crop[0], crop[-1]) if crop else None
    if size is None:
        return None
    first = next((m for m in inner.modules() if isinstance(m, nn.Conv2d)), None)
    # a first convolution of more channels works on what became of the image: patches put into channels, a transform
    return (first.in_channels if first is not None and first.in_channels <= 4 else 3, *size)


def _unwrapped(model: nn.Module) -> nn.Module:
    children = dict(model.named_children())
    return children["module"] if children.keys() == {"module"} else model  # DataParallel and DDP


def _torchvision_family(model: nn.Module) -> str:
    """detection, segmentation, video, optical_flow or quantization; a file's name for classification; else empty."""
    above, _, rest = type(model).__module__.partition("torchvision.models.")
    return rest.partition(".")[0] if not above else ""


def _torchvision_weights(model: nn.Module, name: str) -> Any:
    """The default weights of a builder: the named one, or one of the module that the model's class comes from."""
    if not _torchvision_family(model):
        return None
    from torchvision import models

    for builder in [name] if name else models.list_models():
        if not name and models.get_model_builder(builder).__module__ != type(model).__module__:
            continue
        weights = models.get_model_weights(builder)
        if len(weights):
            return weights.DEFAULT
    return None
