"""What open files ask of those who move their bytes and of those who keep their descriptors."""

from __future__ import annotations

from typing import Protocol

from tierd.node.reads import ReadTarget


class ReadPath(Protocol):
    """Answers READs of a handle outside of the event loop; the overlay says from which descriptor, and until when."""

    def serve_reads(self, fh: int, target: ReadTarget) -> None:
        """From now on."""

    def stop_reads(self, fh: int) -> None:
        """The handle was released."""

    def content_changed(self, node_id: int) -> None:
        """The kernel drops its pages of a node, and asks for the attributes again, its size above all. Waits for READs
        of the node."""

    def attributes_changed(self, node_id: int) -> None:
        """The kernel must ask for the attributes again, its size above all. May block."""

    def drop_pages(self, node_id: int) -> None:
        """The kernel need not keep its cached pages of a node."""

    def offers_passthrough(self) -> bool:
        """True if `back` can be expected to give a backing."""

    def back(self, node_id: int, fd: int) -> int | None:
        """A passthrough backing for one more open of a node; None if there shall be none."""

    def pass_through(self, fh: int, backing_id: int) -> None:
        """The open that returns `fh` uses this backing."""

    def unback(self, node_id: int) -> None:
        """One open with a backing fewer."""


class Holder(Protocol):
    """Keeps descriptors of open files for a daemon that comes after this one."""

    def hold(self, key: int, fd: int) -> None:
        """Keep a duplicate of `fd`. Any thread."""

    def drop(self, key: int) -> None:
        """Let go of it. Any thread."""


class NoHolder:
    """Nobody comes after this one."""

    def hold(self, key: int, fd: int) -> None:
        """See Holder."""

    def drop(self, key: int) -> None:
        """See Holder."""
