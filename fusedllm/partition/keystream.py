"""`KeyStream`: uniform numbers from a cipher, the only generator that pads and secrets are drawn from."""

from __future__ import annotations

import math
import os
import threading
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np

from fusedllm.errors import PadReuseError
from fusedllm.partition.forks import abandon_on_fork, forked

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

CipherName = Literal["aes-256-ctr", "chacha20"]

# Bytes of one key's stream; then a new key is drawn. ChaCha20's counter of 32 bits ends at four times as many, and AES,
# of whose 2^32 blocks no two are alike, can be told from random numbers with an advantage of 2^-65.
MOST_STREAM_BYTES = 2**36

# Zeros to be encrypted at a time.
_ZEROS = bytes(2**20)
# What the ciphers' interface wants as room beyond the result.
_SLACK = 16


class KeyStream:
    """Uniform numbers from a cipher in counter mode, keyed by the operating system; any thread may draw.

    AES-256 in counter mode (NIST SP 800-38A) or ChaCha20 (RFC 8439). Two streams have nothing in common.
    """

    def __init__(self, cipher: CipherName = "aes-256-ctr") -> None:
        self.cipher = cipher
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._context: CipherContext | None = None
        self._left = 0
        abandon_on_fork(self)

    def numbers(self, shape: tuple[int, ...]) -> np.ndarray:
        """The next numbers of the stream, uniform over the ring, as int32.

        Raises:
          PadReuseError: this process was forked from the one that has the stream.
        """
        size = 4 * math.prod(shape)
        made = np.empty(size + _SLACK, np.uint8)
        room = made.data
        with self._lock:
            self._refuse_fork()
            for first in range(0, size, len(_ZEROS)):
                count = min(len(_ZEROS), size - first)
                self._keyed(count).update_into(memoryview(_ZEROS)[:count], room[first:])
        return made[:size].view(np.int32).reshape(shape)

    def _keyed(self, count: int) -> CipherContext:
        if self._context is None or self._left < count:
            # Only policies with pads need it: a model without them loads where it is not installed.
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

            key = os.urandom(32)
            self._context = (
                Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
                if self.cipher == "aes-256-ctr"
                # Its "nonce" of sixteen bytes begins with the counter of blocks.
                else Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
            )
            self._left = MOST_STREAM_BYTES
        self._left -= count
        return self._context

    def _refuse_fork(self) -> None:
        if os.getpid() != self._process:
            raise PadReuseError(forked("a stream of pads", self._process))

    def abandon(self) -> None:
        """Forgets the key: this is a forked process."""
        self._lock, self._context = threading.Lock(), None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PadReuseError("a stream of pads can't be copied or pickled: both copies would draw the same pads.")
