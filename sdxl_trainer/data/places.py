"""Where the rows of the cache lie that a training sample needs."""

from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from sdxl_trainer.data.cache import Place, Store

# Of how many things it is remembered: a few megabytes at most, however large the data set.
REMEMBERED = 4096
Of = TypeVar("Of", bound=Hashable)


class Places(Generic[Of]):
    """Where the rows of things lie, in a store that changes no more; `names` gives the names of a thing's rows. The
    last few thousand are remembered, so that names are neither hashed nor looked for anew each time."""

    def __init__(self, store: Store, names: Callable[[Of], Sequence[str]]) -> None:
        self.store, self.names = store, names
        self._known: dict[Of, tuple[Place, ...]] = {}

    def of(self, wanted: Sequence[Of]) -> list[tuple[Place, ...]]:
        """The places of each thing's rows; KeyError as of `Store.find`."""
        known = self._known
        lacking = [one for one in dict.fromkeys(wanted) if one not in known]
        if len(known) + len(lacking) > REMEMBERED:
            # Not emptied, but left to other threads, which may be about to look into it.
            known = self._known = {}
            lacking = list(dict.fromkeys(wanted))
        if lacking:
            names = [self.names(one) for one in lacking]
            found = iter(self.store.find([name for each in names for name in each]))
            known.update((one, tuple(islice(found, len(each)))) for one, each in zip(lacking, names, strict=True))
        return [known[one] for one in wanted]
