"""Threads of the CPU kernels: forks, many callers, idleness; and calls bound to a layer's tensors."""

import copy
import os
import pickle
import select
import signal
import threading
import time

import pytest
import torch

from bytelane import QuantLinear, _native
from bytelane.kernels import cpu
from bytelane.numerics import linear_integer
from bytelane.packing import unpack_rows

PATIENCE = 60


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make_layer(bits=4, n=512, k=1536, group_size=None, seed=0):
    rng = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (n, k), dtype=torch.int8, generator=rng)
    groups = k // group_size if group_size else 1
    scale = torch.rand(n, groups, generator=rng) * 0.01 + 1e-3
    return QuantLinear.from_codes(
        codes, scale, num_bits=bits, input_scale=0.02, output_scale=0.3, group_size=group_size
    )


def inputs(rows, k=1536, seed=1):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def specified(layer, x):
    return linear_integer(
        x,
        unpack_rows(layer.packed, layer.num_bits, layer.in_features),
        layer.weight_scale,
        layer.input_scale,
        layer.output_scale,
        layer.bias,
        layer.group_size or 0,
    )


# --- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_a_fork_computes_the_same():
    """The pool's threads are not in the child: it must neither wait for them nor answer differently."""
    layer, few, many = make_layer(), inputs(1), inputs(64)
    expected = layer(few), layer(many)  # the pool is running
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        same = torch.equal(layer(few), expected[0]) and torch.equal(layer(many), expected[1])
        os.write(write, b"1" if same else b"0")
        os._exit(0)
    ready, _, _ = select.select([read], [], [], PATIENCE)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    answer = os.read(read, 1) if ready else b"no answer"
    os.close(read), os.close(write)
    assert answer == b"1"
    assert torch.equal(layer(many), expected[1])


def test_many_callers_get_the_bits_of_one():
    layers = [make_layer(bits, group_size=size) for bits in (2, 4, 8) for size in (None, 128)]
    given = [inputs(rows) for rows in (1, 5, 40)]
    expected = [[specified(layer, x) for x in given] for layer in layers]
    wrong = []

    def call(first):
        for turn in range(20):
            at = (first + turn) % len(layers)
            for x, y in zip(given, expected[at], strict=True):
                if not torch.equal(layers[at](x), y):
                    wrong.append(at)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong


def test_callers_at_once_share_the_threads():
    """Who calls while another call runs gets what that one leaves, and one thread at least."""
    assert _native.usable_threads(4) == 4
    assert _native.usable_threads(0) == 1
    isa = cpu.isa_code(cpu.supported_isas()[-1])
    running = threading.Thread(target=_native.peak_dots, args=(isa, 8, 200_000, 3))
    running.start()
    seen = set()
    while running.is_alive():
        seen.add((_native.usable_threads(4), _native.usable_threads(2)))
        time.sleep(0.001)
    assert (1, 1) in seen
    assert _native.usable_threads(4) == 4


def test_idle_threads_sleep():
    layer, x = make_layer(), inputs(64)
    layer(x)
    time.sleep(0.1)  # OpenMP's threads look for work a little longer
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32, 128, 512])
def test_bits_do_not_depend_on_threads_around_every_threshold(bits, group_size):
    """Rows around the number from which a panel is transposed, around tiles, and a K cut into parts between groups."""
    k = 8192 if group_size == 512 else 1536
    layer = make_layer(bits, n=200, k=k, group_size=group_size)
    x = inputs(26, k)
    expected = specified(layer, x)
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        for rows in (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 18, 26):
            assert torch.equal(layer(x[:rows]), expected[:rows]), (threads, rows)


# --- calls bound to a layer's tensors ------------------------------------------------------------------------------


def test_a_layer_follows_its_tensors():
    """What a layer remembers of its last call must not outlive the tensors it is of."""
    layer, other, x = make_layer(), make_layer(seed=7), inputs(2)
    before = layer(x)
    assert torch.equal(before, specified(layer, x))
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    layer.packed = other.packed
    assert torch.equal(layer(x), specified(layer, x))
    assert not torch.equal(layer(x), before)
    with torch.no_grad():
        layer.weight_scale.mul_(2)  # in place: same memory, other values
    assert torch.equal(layer(x), specified(layer, x))
    layer.output_scale = None
    assert torch.equal(layer(x), specified(layer, x))
    for kept in copies:
        assert torch.equal(kept(x), before)
    copies[0].share_memory()  # the tensors are the same objects, elsewhere
    assert torch.equal(copies[0](x), before)


@pytest.mark.parametrize("rows", [1, 20])
def test_a_layer_with_groups_follows_its_scales(rows):
    """What is kept of the scales must not outlive their values, nor be taken from tensors that change unseen."""
    layer, x = make_layer(group_size=32), inputs(rows)
    assert torch.equal(layer(x), specified(layer, x))
    for name in ("weight_scale", "input_scale", "output_scale"):
        with torch.no_grad():
            getattr(layer, name).mul_(1.5)
        assert torch.equal(layer(x), specified(layer, x)), name
    layer.output_scale = torch.tensor(0.2)
    assert torch.equal(layer(x), specified(layer, x))
    with torch.inference_mode():
        unseen = make_layer(group_size=32)
        assert torch.equal(unseen(x), specified(unseen, x))
        unseen.weight_scale.mul_(2)
        assert torch.equal(unseen(x), specified(unseen, x))


def test_a_bound_layer_takes_every_dtype_and_refuses_a_wrong_width():
    layer, x = make_layer(), inputs(3).float()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16):
        assert torch.equal(layer(x.to(dtype)), specified(layer, x.to(dtype)))
        assert torch.equal(layer(x.to(dtype)[None]), specified(layer, x.to(dtype))[None])
        assert layer(x[:0].to(dtype)).shape == (0, 512)
    layer(x)
    with pytest.raises(ValueError, match="1536"):
        layer(x[:, :100])
