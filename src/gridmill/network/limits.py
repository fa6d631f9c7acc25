"""How fast a key may ask and spend: two token buckets for each key that has limits, in whole numbers.

Pure over `now`, monotonic seconds. A bucket holds a minute's worth and starts full, so a burst of one minute passes and
the average is kept. Each gateway counts by itself: with several of them a key can do as much at each.
"""

from __future__ import annotations

from gridmill.network.accounts import Account, KeyId

# A level is counted in parts of 1/(60·10⁹): `per_minute` parts flow in each nanosecond, without rounding.
PARTS = 60_000_000_000
NANOSECONDS = 1_000_000_000
BUCKETS_BEFORE_TIDYING = 1024


class Limits:
    """Asks and spends of all keys at this gateway. A key without limits is never remembered."""

    def __init__(self) -> None:
        self._requests: dict[KeyId, _Bucket] = {}
        self._costs: dict[KeyId, _Bucket] = {}
        self._tidy_at = BUCKETS_BEFORE_TIDYING

    def admit(self, account: Account, now: float) -> float | None:
        """Counts one request; or the seconds after which there is room for it, and nothing is counted."""
        per_minute = account.requests_per_minute
        if per_minute is None:
            return None
        return self._bucket(self._requests, account.key_id, per_minute, now).take(1)

    def reserve_cost(self, account: Account, amount: int, now: float) -> float | None:
        """Counts nanocredits that a work may cost; or the seconds after which there is room for them.

        An amount over a whole minute's worth passes a full bucket and leaves it in debt: it could pass at no other
        time, and the average is kept all the same.
        """
        per_minute = account.cost_per_minute_nanocredits
        if per_minute is None or not amount:
            return None
        return self._bucket(self._costs, account.key_id, per_minute, now).take(amount)

    def settle_cost(self, account: Account, reserved: int, charged: int, now: float) -> None:
        """What was reserved for a work became this charge."""
        per_minute = account.cost_per_minute_nanocredits
        if per_minute is not None:
            self._bucket(self._costs, account.key_id, per_minute, now).give(reserved - charged)

    def __len__(self) -> int:
        return len(self._requests) + len(self._costs)

    def _bucket(self, buckets: dict[KeyId, _Bucket], key_id: KeyId, per_minute: int, now: float) -> _Bucket:
        moment = int(now * NANOSECONDS)
        bucket = buckets.get(key_id)
        if bucket is None:
            if len(self) >= self._tidy_at:
                self._tidy(moment)
            bucket = buckets[key_id] = _Bucket(per_minute, moment)
        bucket.flow(per_minute, moment)
        return bucket

    def _tidy(self, moment: int) -> None:
        """A full bucket says nothing that a new one would not say."""
        for buckets in (self._requests, self._costs):
            for key_id, bucket in list(buckets.items()):
                bucket.flow(bucket.per_minute, moment)
                if bucket.full:
                    del buckets[key_id]
        self._tidy_at = max(BUCKETS_BEFORE_TIDYING, 2 * len(self))


class _Bucket:
    def __init__(self, per_minute: int, moment: int) -> None:
        self.per_minute = per_minute
        self._level = per_minute * PARTS
        self._moment = moment

    @property
    def full(self) -> bool:
        return self._level >= self.per_minute * PARTS

    def flow(self, per_minute: int, moment: int) -> None:
        self.per_minute = per_minute
        elapsed = max(0, moment - self._moment)
        self._level = min(per_minute * PARTS, self._level + elapsed * per_minute)
        self._moment = max(self._moment, moment)

    def take(self, amount: int) -> float | None:
        missing = min(amount, self.per_minute) * PARTS - self._level
        if missing > 0:
            nanoseconds = -(-missing // self.per_minute)
            return nanoseconds / NANOSECONDS
        self._level -= amount * PARTS
        return None

    def give(self, amount: int) -> None:
        self._level = min(self.per_minute * PARTS, self._level + amount * PARTS)
