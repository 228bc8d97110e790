"""The message that verbs share which come at the wrong moment."""

from __future__ import annotations

from clora_core.errors import StateError, message


def out_of_order(verb: str, what: str, fix: str) -> StateError:
    return StateError(
        message(
            f"clora_torch.{verb}",
            what,
            got="a call out of order",
            needed="attach, begin_task, train, observe, end_task, in this order",
            cause="a verb at the wrong moment of a task's life",
            fix=fix,
        )
    )
