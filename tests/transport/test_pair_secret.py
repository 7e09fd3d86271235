"""Secrets of pairs of ranks."""

from common.transport.pair_secret import SECRET_BYTES, pair_secret


def test_a_secret_is_of_the_key_the_worker_and_the_rank() -> None:
    secrets = {
        pair_secret(key, worker, rank)
        for key in (b"a", b"b")
        for worker in ("decode:1", "decode:2")
        for rank in ("ucx://decode:1", "ucx://decode:2")
    }
    assert len(secrets) == 8
    assert {len(secret) for secret in secrets} == {SECRET_BYTES}
    assert pair_secret(b"a", "decode:1", "ucx://decode:1") == pair_secret(b"a", "decode:1", "ucx://decode:1")
