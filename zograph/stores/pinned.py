"""Pinning memory that is already there, at its exact size.

torch's own pinned allocator rounds every block up to a power of two. Here existing
page-aligned memory is registered with CUDA instead, piece by piece: a copy must lie within one
piece.
"""

from __future__ import annotations

import contextlib
import resource
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from zograph.errors import StoreError
from zograph.stores.base import PAGE


class PinnedSlab:
    """Pieces of page-aligned host memory, pinned until closed.

    Parameters
    ----------
    pieces
        uint8 tensors in host memory, each starting on a page. They are kept alive.
    cudart
        The CUDA runtime, by default that of torch.

    Raises
    ------
    StoreError
        If CUDA refuses a piece. Nothing stays pinned then.
    """

    def __init__(self, pieces: Sequence[torch.Tensor], cudart: Any = None) -> None:
        runtime: Any = torch.cuda.cudart() if cudart is None else cudart  # type: ignore[no-untyped-call]
        self._held: list[torch.Tensor] = []
        self._end = weakref.finalize(self, _unregister, runtime, self._held)
        total = sum(piece.numel() for piece in pieces)
        for piece in (p for p in pieces if p.numel()):
            assert piece.data_ptr() % PAGE == 0, "memory to pin must start on a page"
            code = int(runtime.cudaHostRegister(piece.data_ptr(), piece.numel(), 0))
            if code != 0:
                done = self.nbytes
                self.close()
                if cudart is None:
                    _forget_error()
                raise StoreError(_refused(code, done, piece.numel(), total))
            self._held.append(piece)

    @property
    def nbytes(self) -> int:
        """Bytes pinned now."""
        return sum(piece.numel() for piece in self._held)

    def close(self) -> None:
        """Unpin everything; twice is fine."""
        self._end()


def pin(tensor: torch.Tensor, cudart: Any = None) -> PinnedSlab:
    """Pin one page-aligned uint8 tensor in host memory; keep the result while it is in use.

    Raises
    ------
    StoreError
        If CUDA refuses.
    """
    return PinnedSlab([tensor], cudart)


def _unregister(runtime: Any, held: list[torch.Tensor]) -> None:
    while held:
        runtime.cudaHostUnregister(held.pop().data_ptr())


def _forget_error() -> None:
    """Let CUDA forget that it refused: torch would report it at whatever it launches next."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _refused(code: int, done: int, piece: int, total: int) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    start = f"{total} bytes of host memory cannot be pinned for CUDA (error {code}): "
    if limit != resource.RLIM_INFINITY and limit < total:
        return (
            f"{start}this process may lock {limit} bytes. Raise the limit (`ulimit -l unlimited`, "
            f"memlock in /etc/security/limits.conf, `docker run --ulimit memlock=-1`), or use "
            f'storage="disk".'
        )
    return (
        f"{start}{done} bytes were, the next {piece} were not. Free host memory, or use "
        f'storage="disk".'
    )
