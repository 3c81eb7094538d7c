"""Device, CPU memory, disk: which pages are where, and the moves of the step that is being planned."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from infer.pages import Pool
from infer.policy import PageGroup, SchedulerConfig
from infer.request import Stored
from infer.step import NO_MOVES, Copy, DiskMove, HostMove, Moves

__all__ = ["Memory"]


class Memory:
    """The pools of every page group, and what must be moved between them.

    The moves of a step are carried out kind by kind (see :class:`infer.step.Moves`), so what an earlier kind writes may
    be read by a later one, and never the other way round. Pages that a move of this step reads too late, or writes too
    late, to be given away again are *pinned*: they keep one user more until the step is planned.

    Args:
        config: limits.
        groups: of pages.
        disk: keys that earlier runs left on disk, the one used longest ago first.
    """

    def __init__(
        self, config: SchedulerConfig, groups: Sequence[PageGroup], disk: Iterable[tuple[int, bytes]] = ()
    ) -> None:
        self.config, self.groups = config, tuple(groups)
        self.device = tuple(Pool(group.pages) for group in groups)
        self.host = tuple(Pool(group.host_pages) for group in groups)
        self.disk: OrderedDict[tuple[int, bytes], None] = OrderedDict((key, None) for key in disk)
        self.loading: dict[tuple[int, bytes], int] = {}
        self._saving: set[tuple[int, bytes]] = set()
        self._save: list[DiskMove] = []
        self._load: list[DiskMove] = []
        self._out: list[HostMove] = []
        self._back: list[HostMove] = []
        self._copies: dict[tuple[int, int], int] = {}
        self._drop: list[tuple[int, bytes]] = []
        self._pinned: list[tuple[Pool, int]] = []

    def take(self, group: int, count: int) -> list[int]:
        """Device pages with one user each; what was cached in them moves to CPU memory, where there is room."""
        pages, evicted = self.device[group].take(count)
        if evicted and self.config.host_cache and self.host[group].total:
            for page, key in evicted:
                self._keep_on_host(group, page, key)
        return pages

    def bring(self, group: int, keys: Sequence[bytes]) -> list[int]:
        """The device pages with these keys, one user more each: shared if they are there, else read back.

        Each key is on the device or in CPU memory.
        """
        device, host = self.device[group], self.host[group]
        pages = [device.find(key) for key in keys]
        for page, key in zip(pages, keys, strict=True):
            if page is not None:
                device.share(page)
            else:
                source = host.find(key)
                assert source is not None, "neither on the device nor in CPU memory"
                host.share(source)
                self._pinned.append((host, source))
        brought = []
        for page, key in zip(pages, keys, strict=True):
            if page is None:
                source = host.find(key)
                assert source is not None
                (page,) = self.take(group, 1)
                self._back.append(HostMove(group, source, page))
                device.name(page, key)
            brought.append(page)
        return brought

    def storing(self, group: int, pages: Sequence[int]) -> tuple[int, int]:
        """What it takes to :meth:`store` these: pages that must be moved, and available pages of CPU memory."""
        keys, host = self.device[group].keys, self.host[group]
        found = [host.find(key) if (key := keys[page]) is not None else None for page in pages]
        moved = found.count(None)
        return moved, moved + sum(1 for place in found if place is not None and not host.users[place])

    def movable(self, group: int, pages: Iterable[int]) -> bool:
        """Whether these hold their content before the step begins; those that a copy still fills do not."""
        return not self._copies or all((group, page) not in self._copies for page in pages)

    def store(self, group: int, first: int, pages: Sequence[int]) -> Stored:
        """Move device pages to CPU memory; the caller still has to release them.

        Their room was asked for with :meth:`storing`.
        """
        keys, host, stored = self.device[group].keys, self.host[group], []
        found = [host.find(key) if (key := keys[page]) is not None else None for page in pages]
        for place in found:
            if place is not None:
                host.share(place)
        for page, place in zip(pages, found, strict=True):
            if place is None:
                place = self._take_host(group)
                host.share(place)
                self._pinned.append((host, place))
                self._out.append(HostMove(group, page, place))
                if (key := keys[page]) is not None:
                    host.name(place, key)
            stored.append(place)
        return Stored(first, stored)

    def restore(self, group: int, stored: Stored, keys: Sequence[bytes]) -> list[int]:
        """Device pages with what :meth:`store` kept; those that are still cached on the device are not moved.

        Args:
            group: of pages.
            stored: it is given up.
            keys: of those of its pages that are full; they come first.
        """
        device, host = self.device[group], self.host[group]
        found = [device.find(keys[index]) if index < len(keys) else None for index in range(len(stored.pages))]
        for page in found:
            if page is not None:
                device.share(page)
        pages = []
        for index, (page, source) in enumerate(zip(found, stored.pages, strict=True)):
            if page is None:
                (page,) = self.take(group, 1)
                self._back.append(HostMove(group, source, page))
                if index < len(keys):
                    device.name(page, keys[index])
            pages.append(page)
        self._pinned += [(host, page) for page in reversed(stored.pages)]
        return pages

    def copy(self, group: int, source: int) -> int:
        """A device page that will hold a copy of ``source`` when the step computes."""
        (page,) = self.take(group, 1)
        source = self._copies.get((group, source), source)
        self._copies[group, page] = source
        self.device[group].share(source)
        return page

    def pinned_copies(self, group: int) -> int:
        """Pages that are kept because they are still to be copied."""
        return sum(1 for index, _page in self._copies if index == group)

    def forget_copies(self, group: int, pages: Iterable[int]) -> None:
        """The owner of these pages gives them up: what was to be copied into them is not needed any more."""
        if self._copies:
            for page in pages:
                source = self._copies.pop((group, page), None)
                if source is not None:
                    self.device[group].release((source,))

    def load(self, group: int, key: bytes) -> bool:
        """Begin to read a page from disk into CPU memory; False: it is not there, or there is no room for it now."""
        place = (group, key)
        if place in self.loading:
            return True
        if place not in self.disk or len(self._load) >= self.config.loads or not self.host[group].available:
            return False
        self.loading[place] = page = self._take_host(group)
        self.disk.move_to_end(place)
        self._load.append(DiskMove(group, key, page))
        return True

    def finish_plan(self) -> Moves:
        """The moves of the step; what was pinned for their sake is let go."""
        copies = tuple(Copy(group, source, page) for (group, page), source in self._copies.items())
        drop, save, out, load, back = given = (self._drop, self._save, self._out, self._load, self._back)
        moves = NO_MOVES
        if copies or any(given):
            moves = Moves(tuple(drop), tuple(save), tuple(out), tuple(load), tuple(back), copies)
        for (group, _page), source in self._copies.items():
            self.device[group].release((source,))
        for pool, page in self._pinned:
            pool.release((page,))
        for part in (*given, self._copies, self._pinned):
            part.clear()
        return moves

    def committed(self, moves: Moves, lost: Sequence[tuple[int, bytes]]) -> None:
        """The moves of a step were carried out; ``lost`` names pages whose file could not be read or written."""
        for group, key, page in moves.load:
            del self.loading[group, key]
            if (group, key) not in lost:
                self.host[group].name(page, key)
            self.host[group].release((page,))
        for group, key, _page in moves.save:
            self._saving.discard((group, key))
            self.disk[group, key] = None
        for place in lost:
            self.disk.pop(place, None)
        while len(self.disk) > self.config.disk_pages:
            oldest = next((place for place in self.disk if place not in self.loading), None)
            if oldest is None:
                break
            del self.disk[oldest]
            self._drop.append(oldest)

    def pins(self) -> list[tuple[Pool, int]]:
        """Users that are not requests: pages that moves of the next step, or reads from disk, still need."""
        copied = [(self.device[group], source) for (group, _page), source in self._copies.items()]
        loading = [(self.host[group], page) for (group, _key), page in self.loading.items()]
        return [*self._pinned, *copied, *loading]

    def _keep_on_host(self, group: int, page: int, key: bytes) -> None:
        host = self.host[group]
        there = host.find(key)
        if there is not None:
            host.refresh(there)
        elif host.available:
            place = self._take_host(group)
            host.name(place, key)
            self._out.append(HostMove(group, page, place))
            self._pinned.append((host, place))

    def _take_host(self, group: int) -> int:
        """A page of CPU memory; what was cached in it moves to disk, where there is room."""
        (place,), evicted = self.host[group].take(1)
        for page, key in evicted:
            entry = (group, key)
            if entry in self.disk:
                self.disk.move_to_end(entry)
            elif self.config.disk_pages and entry not in self._saving:
                self._saving.add(entry)
                self._save.append(DiskMove(group, key, page))
        return place
