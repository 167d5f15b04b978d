"""Bytes: where runs live, and how what is written there becomes durable."""

from __future__ import annotations

from highcamp.storage.store import NotThere, Reader, Store, open_store

__all__ = ["NotThere", "Reader", "Store", "open_store"]
