"""What a work costs, as integers: node prices, the network's fee, and how one charge is split.

Pure functions. A charge grows with every token, so what is held for the most that a work can use is never exceeded by
what it did use. The user pays the node's price and the fee on top; the fee is split between the network, the pool that
pays for audits and the reserve that pays for failovers, to the nanocredit (largest remainder).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from gridmill.wire.messages import Price

DEFAULT_MAX_TOKENS = 4096  # of a request that names none, where that much fits and can be paid
BASIS_POINTS = 10_000  # one hundredth of a percent


class FeePolicy(msgspec.Struct, frozen=True):
    """What the network adds: `fee` on top of the node's pay; `audit` and `reserve` are shares of that fee."""

    fee_basis_points: int = 500
    audit_share_basis_points: int = 1000
    reserve_share_basis_points: int = 1000


class PriceRow(msgspec.Struct, frozen=True):
    """One version of one node's price for one class, with the fee that held when it was made. Never changed."""

    price_id: str
    price: Price
    fees: FeePolicy

    @property
    def free(self) -> bool:
        return not (
            self.price.input_nanocredits or self.price.cached_input_nanocredits or self.price.output_nanocredits
        )


FREE = PriceRow("free", Price(), FeePolicy())


class Usage(msgspec.Struct, frozen=True):
    """Tokens that count. `cached_tokens` is a part of `input_tokens`."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class Charge(msgspec.Struct, frozen=True):
    """All in nanocredits: `total` is what the user pays and the sum of the next four.

    `subsidy` is what the node earns besides, out of the failover reserve.
    """

    total: int = 0
    node: int = 0
    network: int = 0
    audit: int = 0
    reserve: int = 0
    subsidy: int = 0


NOTHING = Charge()


def charge(row: PriceRow, usage: Usage) -> Charge:
    """What these tokens cost under this row."""
    fees = row.fees
    node = _node_pay(row.price, usage.input_tokens, usage.cached_tokens, usage.output_tokens)
    if not node:
        return NOTHING
    fee = _fee(node, fees)
    return Charge(node + fee, node, *_split_fee(fee, fees))


def share(terms: PriceRow, own: PriceRow, before: Usage, used: Usage, replayed_tokens: int = 0) -> Charge:
    """What one node's part of a work costs, whose user pays by `terms`, the price of the first node.

    `before` is what earlier parts used: the parts of a work add up to what the whole would have cost unbroken. The node
    earns its `own` price, for ids that it had to read again too. What it asks less than the terms goes to the failover
    reserve, what it asks more comes from there.
    """
    if terms is own and not replayed_tokens and not (before.input_tokens or before.output_tokens):
        return charge(terms, used)
    fees = terms.fees
    paid_before = _node_pay(terms.price, before.input_tokens, before.cached_tokens, before.output_tokens)
    paid = _node_pay(terms.price, used.input_tokens, used.cached_tokens, used.output_tokens)
    fee = _fee(paid_before + paid, fees) - _fee(paid_before, fees)
    earned = _node_pay(own.price, used.input_tokens, used.cached_tokens, used.output_tokens)
    earned += replayed_tokens * own.price.input_nanocredits
    node = min(earned, paid)
    network, audit, reserve = _split_fee(fee, fees)
    return Charge(paid + fee, node, network, audit, reserve + paid - node, earned - node)


def subsidy_most(terms: PriceRow, own: PriceRow, input_tokens: int, output_tokens: int, replayed_tokens: int) -> int:
    """The most that the failover reserve may have to add for a part of so many tokens."""
    dearest_input = max(
        own.price.input_nanocredits - terms.price.input_nanocredits,
        own.price.cached_input_nanocredits - terms.price.cached_input_nanocredits,
        0,
    )
    dearer_output = max(own.price.output_nanocredits - terms.price.output_nanocredits, 0)
    return input_tokens * dearest_input + output_tokens * dearer_output + replayed_tokens * own.price.input_nanocredits


def most(row: PriceRow, input_tokens: int, max_tokens: int) -> int:
    """The most that a work can cost the user: nothing cached, every token made."""
    node = _node_pay(row.price, input_tokens, 0, max_tokens)
    return node + _fee(node, row.fees)


def _node_pay(price: Price, input_tokens: int, cached_tokens: int, output_tokens: int) -> int:
    return (
        (input_tokens - cached_tokens) * price.input_nanocredits
        + cached_tokens * price.cached_input_nanocredits
        + output_tokens * price.output_nanocredits
    )


def _fee(node: int, fees: FeePolicy) -> int:
    return -(-node * fees.fee_basis_points // BASIS_POINTS)  # rounded up: at most one nanocredit


def _split_fee(fee: int, fees: FeePolicy) -> tuple[int, int, int]:
    """(network, audit, reserve)"""
    network, audit, reserve = split(
        fee,
        (
            BASIS_POINTS - fees.audit_share_basis_points - fees.reserve_share_basis_points,
            fees.audit_share_basis_points,
            fees.reserve_share_basis_points,
        ),
    )
    return network, audit, reserve


def cheapest(rows: Iterable[PriceRow], input_tokens: int, max_tokens: int) -> PriceRow:
    return min(rows, key=lambda row: most(row, input_tokens, max_tokens))


def within(row: PriceRow, cap: Price | None) -> bool:
    """Whether what a user pays per token, the fee included, stays within `cap` for input and for output."""
    if cap is None:
        return True
    return (
        charge(row, Usage(1, 0, 0)).total <= cap.input_nanocredits
        and charge(row, Usage(0, 0, 1)).total <= cap.output_nanocredits
    )


def split(amount: int, shares: Sequence[int]) -> tuple[int, ...]:
    """Whole parts of `amount` in proportion to `shares`, adding up to it: the largest remainders get the rest."""
    whole = sum(shares)
    parts = [amount * share // whole for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (-(amount * shares[i] % whole), i))
    for i in by_remainder[: amount - sum(parts)]:
        parts[i] += 1
    return tuple(parts)
