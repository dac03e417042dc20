"""`PagePool`: which pages of the KV cache are free; `Pages`: who holds the others, shared beginnings included."""

from __future__ import annotations

from collections.abc import Sequence

from fusedllm.engine.prefix import Node, PrefixCache
from fusedllm.errors import RequestError


class PagePool:
    """Hands out physical pages `1 .. num_pages - 1`; page 0 is the null page and belongs to nobody."""

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, 0, -1))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        """How many pages can be taken."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """How many pages are taken."""
        return len(self._taken)

    def take(self, count: int) -> tuple[int, ...]:
        """`count` pages.

        Raises:
          RequestError: fewer are free.
        """
        if count > len(self._free):
            raise RequestError(f"{count} pages of the KV cache were asked for, {len(self._free)} are free.")
        pages = tuple(self._free.pop() for _ in range(count))
        self._taken.update(pages)
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        """Returns `pages`, each of which must be taken."""
        if not self._taken.issuperset(pages) or len(set(pages)) != len(pages):
            raise RequestError(f"pages {sorted(pages)} were given back, of which some are not taken.")
        self._taken.difference_update(pages)
        self._free.extend(pages)


class Holding:
    """The pages of one request, in the order of its positions, and the nodes of the prefix cache that it uses."""

    __slots__ = ("nodes", "pages")

    def __init__(self) -> None:
        self.pages: list[int] = []
        # The first pages' nodes. A node's page is another than the request's where somebody else published it first.
        self.nodes: list[Node] = []


class Pages:
    """The pages of the cache: free, held by requests, or kept for who begins alike until somebody needs them."""

    def __init__(self, num_pages: int, page_size: int, *, share: bool = True) -> None:
        self.page_size = page_size
        self._pool = PagePool(num_pages)
        self._prefixes = PrefixCache(page_size)
        self._share = share

    @property
    def free(self) -> int:
        """How many pages can be had."""
        return self._pool.free + self._prefixes.unused

    @property
    def in_use(self) -> int:
        """How many pages requests hold, one that several share once."""
        return self._pool.in_use - self._prefixes.unused

    @property
    def cached(self) -> int:
        """How many pages are kept that nobody holds."""
        return self._prefixes.unused

    def hold_prefix(self, ids: Sequence[int], salt: str) -> Holding:
        """The pages of the longest beginning of `ids` that is cached, and not all of them: the last must be run."""
        holding = Holding()
        if self._share:
            for node in self._prefixes.match(ids[:-1], salt):
                self._prefixes.use(node)
                holding.nodes.append(node)
                holding.pages.append(node.page)
        return holding

    def grow(self, holding: Holding, positions: int) -> bool:
        """Gives `holding` the pages for `positions`; nothing happens and the answer is no where they can't be had."""
        missing = -(-positions // self.page_size) - len(holding.pages)
        if missing > self.free:
            return False
        if missing > 0:
            holding.pages += self.take(missing)
        return True

    def take(self, count: int) -> tuple[int, ...]:
        """`count` pages for whoever gives them back with `give_back`.

        Raises:
          RequestError: fewer can be had.
        """
        if count > self._pool.free:
            self._pool.give_back(self._prefixes.evict(count - self._pool.free))
        return self._pool.take(count)

    def give_back(self, pages: Sequence[int]) -> None:
        """Returns pages that `take` gave."""
        self._pool.give_back(pages)

    def publish(self, holding: Holding, ids: Sequence[int], salt: str, *, last: bool = False) -> None:
        """Lets others share the full pages of `ids`, which must be written by what has been launched.

        Where others have published the same tokens before, a request that goes on stops there: it would keep their
        pages from being given up, and uses its own. One that releases its hold next (`last`) has no such care.
        """
        if not self._share:
            return
        nodes = holding.nodes
        for index in range(len(nodes), len(ids) // self.page_size):
            tokens = ids[index * self.page_size : (index + 1) * self.page_size]
            parent = nodes[-1] if nodes else None
            if not last and self._prefixes.child(parent, tokens, salt) is not None:
                return
            nodes.append(self._prefixes.add(parent, tokens, holding.pages[index], salt))

    def release(self, holding: Holding) -> None:
        """Ends a request's hold; what it published stays until its pages are needed."""
        published = {node.page for node in holding.nodes}
        self._pool.give_back([page for page in holding.pages if page not in published])
        for node in reversed(holding.nodes):
            self._prefixes.release(node)
        holding.pages, holding.nodes = [], []

    def forget(self) -> None:
        """Drops what is kept, for when the device has lost it."""
        self._pool.give_back(self._prefixes.forget())
