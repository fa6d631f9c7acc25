"""The ledger: double entry, append-only, integer nanocredits, two-phase, with ids chosen by the caller.

Every movement of money is one transfer whose legs add up to zero. A pending (TigerBeetle's two-phase transfer) takes
money out of an account into a holding account at once; posts pay it out in parts, and it ends exactly once: by a post
that closes it, a void or its expiry, when the rest goes back where it came from. Nothing is ever changed or removed: a
correction is another transfer.

    user:ACCOUNT:available      what the user can spend
    user:ACCOUNT:hold           leased to a gateway, which holds works against it
    escrow:request              held for works that are running, by the gateways' journal
    provider:OWNER:earned_held  earned, in the window in which audits may still convict
    provider:OWNER:available    earned, ready to be paid out
    provider:OWNER:payout_inflight
    network:fees  audit:pool  failover:reserve
    rail:CHAIN:hot  rail:CHAIN:fees
    rail:CHAIN:external  loss  fx:A/B       the outside: may be negative, so that the sum of all accounts is zero

Commands are decided over a Book (a snapshot of the rows they touch) by pure functions and written in one go, so that
one database transaction carries hundreds of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from gridmill.network.store import Transaction

Leg = tuple[str, int]  # account, nanocredits: negative pays, positive receives


class Transfer(msgspec.Struct, frozen=True):
    """Moves money at once. `legs` add up to zero."""

    transfer_id: str
    kind: str
    legs: tuple[Leg, ...]
    memo: str = ""


class Pend(msgspec.Struct, frozen=True):
    """Takes `amount`, or as much of it as there is down to `at_least`, from `source` into the account `into`.

    With `parent`, another open pending, `source` must be that one's `into`: the money is taken out of its remainder (a
    work's hold carved out of a gateway's lease) and the rest of this one goes back to it while it is open. `key_id` is
    an API key whose budget limits the amount. `holder` is the gateway. The pending's id is the transfer's.
    """

    transfer_id: str
    kind: str
    source: str
    into: str
    amount: int
    expires_ms: int
    at_least: int = -1  # -1: all of `amount` or nothing
    parent: str = ""
    key_id: str = ""
    holder: str = ""


class Grow(msgspec.Struct, frozen=True):
    """Adds to an open pending that has no parent, from its own source; `amount`, `at_least` and budget as in Pend."""

    transfer_id: str
    pending_id: str
    amount: int
    at_least: int = -1


class Post(msgspec.Struct, frozen=True):
    """Pays `legs` (all positive) out of an open pending; `close` ends it and returns the rest."""

    transfer_id: str
    pending_id: str
    kind: str
    legs: tuple[Leg, ...]
    close: bool
    memo: str = ""


class Return(msgspec.Struct, frozen=True):
    """Gives up to `amount` of an open pending back to where it came from; the pending stays open."""

    transfer_id: str
    pending_id: str
    amount: int


class Void(msgspec.Struct, frozen=True):
    """Ends an open pending and returns all that is left. With `expired`, only when its time is over."""

    transfer_id: str
    pending_id: str
    expired: bool = False


class Extend(msgspec.Struct, frozen=True):
    """Moves the expiry of an open pending; no money moves, so it has no id and may be repeated."""

    pending_id: str
    expires_ms: int


Command = Transfer | Pend | Grow | Post | Return | Void | Extend


class Done(msgspec.Struct, frozen=True):
    """It happened; `amount` is what was taken, paid or returned. `repeated`: an earlier call had done it already."""

    amount: int
    repeated: bool = False


class Refused(msgspec.Struct, frozen=True):
    """Nothing happened.

    conflict: the id exists with another body. insufficient: `available` is all that could be had, limited by the
    `balance` of an account or the `budget` of a key. closed: the pending has ended (or expired, for an Extend of one
    past its time). too_much: a post over what remains. unknown: no such pending. not_expired: a Void with `expired`
    came too early.
    """

    reason: Literal["conflict", "insufficient", "closed", "too_much", "unknown", "not_expired"]
    available: int = 0
    limited_by: Literal["", "balance", "budget"] = ""


Result = Done | Refused


async def apply(transaction: Transaction, commands: Sequence[Command]) -> list[Result]:
    """Decides and writes the commands in order, each by itself: one that is refused changes nothing.

    Raises ValueError on a command that no caller may build (legs that do not add up, an unknown kind of account).
    """
    raise NotImplementedError
