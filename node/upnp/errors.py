"""What a router, or what takes itself for one, does wrong: in words, for the log."""


class RouterError(Exception):
    """It did not answer as it should, or not in time."""


class RouterRefusal(RouterError):
    """It answered that it will not; ``code`` is UPnP's."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"it refuses: {reason or 'no reason given'} ({code})")
        self.code = code
