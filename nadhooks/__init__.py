"""nadhooks: which part of a trained network does what.

`attach` puts gates on a model through forward hooks, `learn` finds the units that each task needs, `Masks` holds what
was learnt, `flow_graph` and `render` show it.
"""

from . import analysis, methods, objectives, sites
from ._version import __version__
from .errors import NadhooksError
from .evaluation import verify
from .flow import flow_graph
from .formats import read_graph, render
from .gates import Gates, attach
from .learning import learn
from .masks import Masks, load
from .sites import Site
from .units import unit_flow

__all__ = [
    "Gates",
    "Masks",
    "NadhooksError",
    "Site",
    "__version__",
    "analysis",
    "attach",
    "flow_graph",
    "learn",
    "load",
    "methods",
    "objectives",
    "read_graph",
    "render",
    "sites",
    "unit_flow",
    "verify",
]
