"""What can be wrong with a concept; every message says what, where and how to fix it."""


class CarrierError(ValueError):
    """Something about a concept is wrong."""


class CarrierFileError(CarrierError):
    """A file cannot be read or written as a concept."""


class CarrierMismatch(CarrierError):
    """A concept does not fit what it is connected to."""
