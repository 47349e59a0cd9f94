"""The storage of a growing cache: keys and values with free space behind them, shared by states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

SLACK = 64
"""Number of free entries in lent storage, which is the number of steps until all of it is copied again"""


class Placed(TypedDict):
    """Keys and values of a layer, and the storage that they are views of."""

    keys: Tensor
    values: Tensor
    room: Room


@dataclass
class Room:
    """Storage with free space behind the entries. A state sees its entries from ``start`` on.

    New entries are only written behind all others, so that states can share storage. ``lent`` storage is the exception:
    `drop` removes entries from it in place. The first `drop` allocates lent storage; only states that grew from it see
    it, and the next `drop` invalidates them.
    """

    keys: Tensor
    """[..., Hkv, capacity, d]"""
    values: Tensor
    used: int
    """place of the next entry"""
    start: int = 0
    lent: bool = False

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, more: int, *, lent: bool = False) -> Room:
        """Return a copy of entries [..., Hkv, n, d] with space for ``more``."""
        n = keys.shape[-2]
        # tensors created in inference mode cannot be written to outside of it
        with torch.inference_mode(False):
            storage = [x.new_empty(*x.shape[:-2], n + more, x.shape[-1]) for x in (keys, values)]
        room = cls(*storage, used=n, lent=lent)
        room.keys[..., :n, :] = keys
        room.values[..., :n, :] = values
        return room

    def has_room_behind(self, n: int, q: int) -> bool:
        """Return whether the storage ends with this state of ``n`` entries and has space for ``q`` more."""
        return self.used == self.start + n and self.used + q <= self.keys.shape[-2]

    def append(self, keys: Tensor, values: Tensor) -> Placed:
        """Return the views and the storage after new entries [..., Hkv, q, d] are written behind all others."""
        end = self.used + keys.shape[-2]
        self.keys[..., self.used : end, :] = keys
        self.values[..., self.used : end, :] = values
        self.used = end
        return self.placed()

    def drop(self, gone: Tensor) -> Placed:
        """Return the views and the storage without the entry ``gone`` [..., Hkv, 1] of each head, in the same order.

        The entries before it move up by one place, and the storage begins one place later. Only entries before the last
        one of ``gone`` are moved: the sinks of a stream, or the heavy hitters of H2O, whose newer half is protected. If
        the heads of a batch agree (TOVA), each sequence moves only its own.
        """
        moved = replace(self, start=self.start + 1)
        # reading the values from a GPU would wait for it
        first, last = (0, moved.used - self.start - 1) if gone.is_cuda else map(int, torch.aminmax(gone))
        alike = first < last and not gone.is_cuda and gone.dim() == 3 and bool((gone == gone[:, :1]).all())
        for storage in (self.keys, self.values):
            if first == last:
                moved._shift(storage, last)
            elif alike:  # the heads of each sequence agree
                for own, n in zip(storage, gone[:, 0, 0].tolist(), strict=True):
                    moved._shift(own, n)
            else:
                places = torch.arange(last, device=gone.device)
                before = self._rows(storage, self.start + places + (places >= gone))
                storage[..., moved.start : moved.start + last, :] = before
        return moved.placed()

    def _shift(self, storage: Tensor, n: int) -> None:
        """Move the ``n`` entries before the start's place up by one place."""
        storage[..., self.start : self.start + n, :] = storage[..., self.start - 1 : self.start - 1 + n, :].clone()

    @staticmethod
    def _rows(storage: Tensor, places: Tensor) -> Tensor:
        """Return the vectors at ``places`` [..., Hkv, m] of each head: [..., Hkv, m, d]."""
        heads = torch.arange(places[..., 0].numel(), device=places.device).view(*places.shape[:-1], 1)
        flat = (heads * storage.shape[-2] + places).flatten()
        return storage.view(-1, storage.shape[-1]).index_select(0, flat).view(*places.shape, -1)

    def placed(self) -> Placed:
        """Return the views of the entries, and the storage."""
        seen = slice(self.start, self.used)
        return {"keys": self.keys[..., seen, :], "values": self.values[..., seen, :], "room": self}
