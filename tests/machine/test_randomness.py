"""Seeds are a function of their key alone, and the same on every machine."""

import hashlib

import torch

from altopt.machine.randomness import generator, seed_of


def test_seed_is_the_keys_hash_and_so_the_same_in_every_process():
    digest = hashlib.sha256(b"\0".join([b"3", b"stage1", b"0017", b"000012"])).hexdigest()
    assert seed_of(3, "stage1", "0017", "000012") == int(digest[:16], 16) // 2


def test_seed_depends_on_every_part_and_on_their_order():
    keys = [(), (0,), (1,), (0, 1), (1, 0), (0, 1, 0), ("0", "11"), ("01", "1"), (0, True), (0, False), (0, None)]
    assert len({seed_of(*key) for key in keys}) == len(keys)


def test_seeds_fit_and_use_their_63_bits():
    seeds = [seed_of("bits", k) for k in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    torch.manual_seed(max(seeds))


def test_generators_of_a_key_draw_the_same_whatever_was_drawn_before():
    first = torch.rand(5, generator=generator("key", 1))
    torch.rand(3)
    torch.rand(3, generator=generator("key", 2))
    assert torch.equal(first, torch.rand(5, generator=generator("key", 1)))
    assert not torch.equal(first, torch.rand(5, generator=generator("key", 2)))


def test_generators_leave_torchs_own_alone():
    state = torch.get_rng_state()
    torch.rand(3, generator=generator("key"))
    assert torch.equal(state, torch.get_rng_state())
