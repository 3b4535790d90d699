"""The head as an actor on a Ray cluster, on the coordinator's machine, which fetches the workers' messages from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from harness.workers.head import Head, HeadLost, Replaced
from harness.workers.worker import Message


@dataclass(frozen=True)
class Arrived:
    """A worker starts; `before` is its previous owner if Ray restarts it."""

    number: int
    where: str
    before: str | None


class RayHead(Head):
    """The actor. Its calls run one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self._owners: dict[int, str] = {}  # by the worker's number
        self._messages: list[Message | Arrived] = []
        self._fetched = 0  # number of messages that the coordinator has fetched

    def arrive(self, number: int, owner: str, where: str) -> None:
        """Register a starting worker; an earlier one with its number counts as dead from here on."""
        before = self._owners.get(number)
        if before is not None:
            self.leave(before)
        self._owners[number] = owner
        self.enter(owner)
        self._messages.append(Arrived(number, where, before))

    def hear(self, owner: str, message: Message) -> None:
        if owner not in self._owners.values():
            raise Replaced
        self._messages.append(message)

    def messages(self, fetched: int) -> list[Message | Arrived]:
        """Return the messages after the first `fetched`, which are deleted."""
        del self._messages[: fetched - self._fetched]
        self._fetched = fetched
        return list(self._messages)


def ask(head: Any, method: str, *arguments: Any) -> Any:
    """Call a method of the actor (`harness.workers.head.Ask`)."""
    return answer(getattr(head, method).remote(*arguments), lambda _: HeadLost())


def answer(reference: Any, gone: Callable[[RayError], BaseException]) -> Any:
    """Return what the actor returns, or raise its error; `gone` makes the error of one that is dead."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise gone(error) from error
