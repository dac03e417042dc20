"""`PrefixCache`: which pages of the KV cache hold which beginnings of prompts, shared by all who begin alike.

A tree with a full page of tokens at each node, as in RadixAttention (arXiv:2312.07104) but cut at pages. Tokens are
compared, not hashes of them: two prompts never share a page by accident. Plain Python.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence

# Outdated entries in the order of eviction that are not worth a clean-up.
SLACK = 64


class Node:
    """A full page of tokens after those of its `parent`. `users` counts the requests that read it."""

    __slots__ = ("children", "page", "parent", "stamp", "tokens", "users")

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], page: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.page = page
        self.children: dict[tuple[int, ...], Node] = {}
        self.users = 0
        self.stamp = 0


class PrefixCache:
    """The tree of each salt, and the order in which unused pages are given up: least recently used first.

    Whoever uses a node uses all before it. So the nodes without users are whole subtrees, and their leaves can go.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._unused = 0
        self._order: list[tuple[int, int, Node]] = []
        self._serial = itertools.count()

    @property
    def unused(self) -> int:
        """How many pages nobody uses: as many `evict` can give."""
        return self._unused

    def match(self, ids: Sequence[int], salt: str = "") -> list[Node]:
        """The nodes of the longest cached beginning of `ids`, in order; `use` them before anything is evicted."""
        node = self._roots.get(salt)
        found: list[Node] = []
        for at in range(0, len(ids) - self.page_size + 1, self.page_size):
            node = node and node.children.get(tuple(ids[at : at + self.page_size]))
            if node is None:
                break
            found.append(node)
        return found

    def use(self, node: Node) -> None:
        """Counts a user more."""
        self._unused -= not node.users
        node.users += 1

    def release(self, node: Node) -> None:
        """Counts a user less; a request releases its nodes from the last to the first."""
        node.users -= 1
        if not node.users:
            self._unused += 1
            self._clock += 1
            node.stamp = self._clock
            self._offer(node)

    def child(self, parent: Node | None, tokens: Sequence[int], salt: str = "") -> Node | None:
        """The node of `tokens` after `parent` (`None`: at the start), if there is one."""
        node = parent or self._roots.get(salt)
        return node and node.children.get(tuple(tokens))

    def add(self, parent: Node | None, tokens: Sequence[int], page: int, salt: str = "") -> Node:
        """The node of `tokens` after `parent` (`None`: at the start), used once more; `page` is its if it is new."""
        if parent is None:
            parent = self._roots.setdefault(salt, Node(None, (), 0))
        key = tuple(tokens)
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(parent, key, page)
            self._unused += 1
        self.use(node)
        return node

    def evict(self, count: int) -> list[int]:
        """Forgets up to `count` unused pages, and returns them."""
        pages: list[int] = []
        while len(pages) < count and self._order:
            stamp, _, node = heapq.heappop(self._order)
            parent = node.parent
            if node.users or node.children or stamp != node.stamp or parent is None:
                continue
            del parent.children[node.tokens]
            node.parent = None
            self._unused -= 1
            pages.append(node.page)
            if parent.parent is not None and not parent.users:
                self._offer(parent)
            elif parent.parent is None and not parent.children:
                self._roots = {salt: root for salt, root in self._roots.items() if root is not parent}
        return pages

    def forget(self) -> list[int]:
        """Evicts every unused page, for when what the pages hold is lost; nothing may be in use.

        A node in use stays, so its users must be gone before.
        """
        return self.evict(self._unused)

    def nodes(self) -> Iterable[Node]:
        """Every node, in no order."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    def _offer(self, node: Node) -> None:
        if node.children:
            return
        heapq.heappush(self._order, (node.stamp, next(self._serial), node))
        if len(self._order) > 2 * self._unused + SLACK:
            # Most entries are of nodes that were used again since.
            self._order = [entry for entry in self._order if not entry[2].users and entry[0] == entry[2].stamp]
            heapq.heapify(self._order)
