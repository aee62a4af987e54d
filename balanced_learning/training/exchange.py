"""What the processes of a program tell each other between two batches."""

from balanced_learning.training import distributed
from balanced_learning.training.errors import SharedError, warn
from balanced_learning.training.signals import Stopped, StopSignals


class Exchange:
    """Lets all processes know, at the same batch, of a signal to one of them and of images that could not be read.

    Args:
        signals: to this process.
        max_unreadable: images of which that may be so.

    Attributes:
        is_stopping (bool): whether one of them has received a signal, as all know.
    """

    def __init__(self, signals: StopSignals, max_unreadable: int) -> None:
        self.signals = signals
        self.max_unreadable = max_unreadable
        self.is_stopping = False
        self._agreement = distributed.Agreement()
        self._found: set[str] = set()  # a line for each image that this process could not read, not told yet
        self._unreadable: set[str] = set()  # those of all processes that are told

    def tell(self, unreadable: list[str], **numbers: float) -> dict[str, float]:
        """Tells of images, with a line each, and of numbers; hears what was told before, and returns the sums.

        Raises:
            SharedError: if too many images cannot be read.
        """
        self._found |= set(unreadable) - self._unreadable
        stop = self.signals.received is not None
        return self._hear(self._agreement.exchange(stop=stop, unreadable=len(self._found), **numbers))

    def finish(self) -> dict[str, float]:
        """Hears what was told last; as :meth:`tell`."""
        return self._hear(self._agreement.finish())

    def _hear(self, told: dict[str, float]) -> dict[str, float]:
        self.is_stopping |= bool(told.get("stop"))
        if told.get("unreadable"):
            new = set().union(*distributed.gather(self._found)) - self._unreadable
            self._found.clear()
            self._unreadable |= new
            for line in sorted(new) if distributed.is_main() else ():
                warn(line)
        if len(self._unreadable) > self.max_unreadable:
            raise SharedError(
                f"{len(self._unreadable)} images cannot be read, more than --max-unreadable {self.max_unreadable}"
            )
        return told

    def stop_if_asked(self, where: str) -> None:
        """Raises :class:`Stopped`, which says so and where, on all processes if one has received a signal."""
        if self.is_stopping:
            raise Stopped(f"stopped by {self.signals.received or 'a signal to another process'} {where}")
