"""Errors that a user can act on: the command line prints their text and exits with status 2."""


class MMMoEError(Exception):
    """Base of every expected failure: the message names the value, the rule and a way out."""


class ConfigError(MMMoEError):
    """A setting, flag or recipe that cannot work."""


class DataError(MMMoEError):
    """A data set, split, row or label that breaks its contract."""


class ParallelismError(MMMoEError):
    """A layout of processes and experts that cannot work."""


class CheckpointError(MMMoEError):
    """A checkpoint that is missing, incomplete, damaged or of another run."""
