"""`PagePool`: which pages of the KV cache are free."""

from __future__ import annotations

from collections.abc import Sequence

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
