"""Which model masks belong to: fingerprints of its structure and its weights, and what tells two structures apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from .errors import SiteError
from .masks import Masks, described
from .sites import Site, unwrapped
from .tracing import Trace


def structure_of(sites: Sequence[Site], parameters_behind: Mapping[str, int]) -> str:
    """A fingerprint of what masks depend on: each site's tensor, and how many parameters lie behind it.

    What comes after the last site, such as a classifier for another number of classes, does not count, and neither
    does the library that wrote the model.
    """
    lines = [
        [unwrapped(site.name), site.axis, site.units, site.block, site.alternating, parameters_behind.get(site.name, 0)]
        for site in sites
    ]
    return _sha256(json.dumps(lines).encode())


def weights_of(model: nn.Module) -> str | None:
    """A fingerprint of all parameters and buffers, by name, type, shape and value; None on the meta device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: unwrapped(item[0])):
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            return None
        digest.update(f"{unwrapped(name)} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return f"sha256:{digest.hexdigest()}"


def without_wrappers(masks: Masks, sites: Sequence[Site]) -> Masks:
    """Masks whose modules are called as those of `sites`, where only the wrapper of the whole model differs."""
    names = {unwrapped(site.module): site.module for site in sites}
    if any(names.get(unwrapped(site.module), site.module) != site.module for site in masks.sites):
        return masks.renamed(lambda name: names.get(unwrapped(name), name))
    return masks


def parameters_of_sites(seen: Trace, sites: Iterable[Site]) -> dict[str, int]:
    """{site: how many of the model's parameters ran after the site before it}; of a module's sites, the first has them.

    Parameters count where they run first, and shared ones once.
    """
    first: dict[str, Site] = {}
    for site in sites:
        first.setdefault(site.module, site)
    found = {site.name: 0 for site in first.values()}
    known: set[int] = set()
    waiting = 0
    for call in seen.fired():
        own = {id(parameter): parameter.numel() for parameter in call.module.parameters(recurse=False)}
        new = sum(size for key, size in own.items() if key not in known)
        known |= own.keys()
        if call.name not in first:
            waiting += new
        elif first[call.name].side == "output":
            found[first[call.name].name], waiting = waiting + new, 0
        else:
            found[first[call.name].name], waiting = waiting, new
    return found


def unlike(masks: Masks, sites: Sequence[Site], parameters_behind: Mapping[str, int]) -> dict[str, str]:
    """{site: how it differs} of what masks say of their sites and what a model has; empty where all is the same."""
    here = {site.name: site for site in sites}
    there = masks.provenance.get("parameters_behind", {})
    found = {}
    for site in masks.sites:
        if site.name not in here:
            found[site.name] = f"expected {described(site)}, found no such site"
        elif here[site.name] != site:
            found[site.name] = f"expected {described(site)}, found {described(here[site.name])}"
        elif there.get(site.name, parameters_behind.get(site.name)) != parameters_behind.get(site.name):
            found[site.name] = (
                f"expected {described(site)} behind {there[site.name]:,} parameters, "
                f"found {parameters_behind.get(site.name, 0):,}"
            )
    known = {site.name for site in masks.sites}
    return found | {name: "found here, but the masks have no such site" for name in here if name not in known}


def misfit(differ: Mapping[str, str], remedy: str) -> SiteError:
    """The error for what `unlike` found."""
    (site, first), *others = differ.items()
    more = f" (and {len(others)} more)" if others else ""
    return SiteError(f"the masks do not fit this model: {site}: {first}{more}; {remedy}")


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
