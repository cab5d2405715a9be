"""Every random choice of the pipeline is a hash of what it is for."""

import hashlib


def seeded(*parts: object) -> int:
    """Return 64 bits that depend on `parts` alone: no order of work, process or machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
