"""Which training of an autoencoder may commit: the one that began last.

A rank that is lost to its command, by a network that failed for instance, may still work and commit when others have
taken its place. So each start of a training takes a number, larger than those before, and commits only while it is the
lake's.
"""

from sae.jobs.lake import Snapshot, Transaction
from sae.schemas.errors import ConflictError


def latest(snapshot: Snapshot, names: list[str]) -> int:
    """The largest number that trainings of these autoencoders have taken; 0 where there was none."""
    return max((_of(snapshot, name) for name in names), default=0)


def take(transaction: Transaction, name: str, number: int) -> None:
    """From the commit on, trainings of smaller numbers commit no more. Raises ConflictError where one began later."""
    if _of(transaction.base, name) >= number:
        raise _begun(name)
    transaction.require(lambda now: _of(now, name) < number, f"autoencoder {name}: taken over")
    transaction.set(_key(name), number)


def require(transaction: Transaction, name: str, number: int) -> None:
    """Lets the transaction commit only if no other training has begun. Raises ConflictError where one has."""
    if _of(transaction.base, name) != number:
        raise _begun(name)
    transaction.require(lambda now: _of(now, name) == number, f"autoencoder {name}: taken over")


def _key(name: str) -> str:
    return f"training/{name}"


def _of(snapshot: Snapshot, name: str) -> int:
    return int(snapshot.properties.get(_key(name), 0))


def _begun(name: str) -> ConflictError:
    return ConflictError(
        f"autoencoder {name}: another training of it began later, and goes on from the last checkpoint; let only one "
        "go on"
    )
