"""nadhooks: which part of a trained network does what.

`attach` puts gates on a model through forward hooks, `learn` finds the units that each task needs, `Masks` holds what
was learnt, `flow_graph` and `render` show it.
"""

from . import analysis, methods, objectives, sites
from ._version import __version__
from .collapsing import collapse
from .errors import NadhooksError
from .evaluation import verify
from .flow import flow_graph
from .folding import sub_architecture
from .gates import Gates, attach
from .learning import learn
from .masks import Masks, load
from .rendering import contact_sheet, read_graph, render
from .seeing import what_units_see
from .shrinking import shrink
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
    "collapse",
    "contact_sheet",
    "flow_graph",
    "learn",
    "load",
    "methods",
    "objectives",
    "read_graph",
    "render",
    "shrink",
    "sites",
    "sub_architecture",
    "unit_flow",
    "verify",
    "what_units_see",
]
