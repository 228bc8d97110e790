"""Errors whose usual cause is the same in many places. clora_core composes the messages."""

from __future__ import annotations

from clora_core.errors import OptionError, StateError, message


def option_error(
    verb: str, what: str, got: object, needed: str, fix: str, cause: str = "a misspelt name"
) -> OptionError:
    """An option or name that does not fit."""
    return OptionError(message(f"clora_jax.{verb}", what, got=got, needed=needed, cause=cause, fix=fix))


def state_error(verb: str, what: str, got: object, fix: str) -> StateError:
    """A verb at the wrong moment of a task's life."""
    needed = "begin_task, train, observe, end_task, in this order"
    cause = "a verb at the wrong moment of a task's life"
    return StateError(message(f"clora_jax.{verb}", what, got=got, needed=needed, cause=cause, fix=fix))
