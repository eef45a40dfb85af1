"""Every error that a user can cause: one base, and a kind for each thing a user hands over."""


class NadhooksError(Exception):
    """The base of every error that nadhooks raises on purpose."""


class SiteError(NadhooksError):
    """No site, a site that never fires, an axis that cannot be determined, or sites that do not fit the masks."""


class TaskError(NadhooksError):
    """Labels or task names that the gates or masks do not know."""


class LearningError(NadhooksError):
    """Data or a loss from which no mask can be learnt."""


class ModelError(NadhooksError):
    """A model, its weights or its example input that cannot be used."""


class DataError(NadhooksError):
    """A data set that cannot be read or does not fit the model."""


class MaskFileError(NadhooksError):
    """A file that is not a mask file that this version can read."""


class RenderError(NadhooksError):
    """A picture or file that cannot be made or written."""


class GraphFileError(NadhooksError):
    """A file that is not a flow graph that this version can read."""
