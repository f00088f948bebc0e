"""`pack_codes` and `unpack_codes` and their Triton kernels: every width, compared with numpy."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
from dad_fast.kernels import pack_codes, unpack_codes

WIDTHS = list(range(1, 33))


def by_numpy(codes, bits):
    stream = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    return np.packbits(
        stream.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little"
    )


def unpack_by_numpy(packed, bits, length):
    """Return the codes by the formula in the module's docstring."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little")[..., : length * bits]
    return stream.reshape(*packed.shape[:-1], length, bits) @ (1 << np.arange(bits, dtype=np.int64))


def draw(shape, bits):
    codes = torch.randint(0, 1 << bits, shape)
    if codes.numel() > 1:
        codes.view(-1)[0], codes.view(-1)[-1] = (1 << bits) - 1, 0
    return codes


def by_the_kernels():
    from dad_fast.kernels import pack_codes_triton

    return pack_codes_triton.pack, pack_codes_triton.unpack


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width(bits):
    for length in (0, 1, 7, 8, 9, 33, 784):
        codes = draw((3, length), bits)
        packed = pack_codes(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (3, -(-length * bits // 8))
        assert np.array_equal(packed.numpy(), by_numpy(codes, bits))
        assert np.array_equal(unpack_by_numpy(packed.numpy(), bits, length), codes.numpy())
        assert torch.equal(unpack_codes(packed, bits, length), codes)


# Divisors of 32 and of 8, others below and above them, and the largest.
@pytest.mark.interpreter
@pytest.mark.parametrize("bits", [1, 3, 4, 7, 8, 9, 10, 14, 16, 17, 23, 31, 32])
def test_kernels(bits):
    pack, unpack = by_the_kernels()
    counter = torch.full((), 5, dtype=torch.int64)
    for shape in ((0,), (1,), (2, 9), (2, 0), (1, 2, 1100)):
        codes = draw(shape, bits)
        packed = pack(codes, bits, counter)
        assert np.array_equal(packed.numpy(), by_numpy(codes, bits))
        assert torch.equal(unpack(packed, bits, shape[-1]), codes)
    assert torch.equal(pack(codes, bits, None), packed)
    assert counter == 5
    codes[..., 3], codes[..., 700] = -1, 1 << bits
    wrapped = pack(codes, bits, counter)
    # Two codes in each of the two rows.
    assert counter == 9
    assert torch.equal(unpack(wrapped, bits, 1100), codes & ((1 << bits) - 1))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 7, 8, 10, 14, 32])
def test_cuda_equals_the_cpu(bits):
    codes = draw((257, 784), bits)
    counter = torch.zeros((), dtype=torch.int64, device="cuda")
    packed = pack_codes(codes.cuda(), bits, counter)
    assert torch.equal(packed.cpu(), pack_codes(codes, bits)) and counter.item() == 0
    assert torch.equal(unpack_codes(packed, bits, 784).cpu(), codes)
    pack_codes(codes.cuda() - (1 << bits), bits, counter)
    assert counter.item() == codes.numel()


def test_784_codes_of_14_bits_take_1372_bytes():
    assert pack_codes(torch.zeros(784, dtype=torch.int64), 14).shape == (1372,)


def test_bits_after_the_last_code_are_zero_and_ignored():
    codes = draw((5,), 7)
    packed = pack_codes(codes, 7)
    assert packed[-1] >> 3 == 0
    packed[-1] |= 0b1111_1000
    assert torch.equal(unpack_codes(packed, 7, 5), codes)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_dtypes_and_strides(dtype):
    codes = torch.randint(0, 100, (6, 40)).to(dtype)
    expected = pack_codes(codes.long(), 7)
    assert torch.equal(pack_codes(codes, 7), expected)
    assert torch.equal(pack_codes(codes.T.contiguous().T, 7), expected)
    wide = torch.zeros(6, 70, dtype=torch.uint8)
    wide[:, ::2] = expected
    assert torch.equal(unpack_codes(wide[:, ::2], 7, 40), codes.long())


def test_codes_out_of_range_are_refused():
    for code in (-1, 128, 1 << 40):
        with pytest.raises(ValueError, match=rf"code {code} does not fit 7 bits"):
            pack_codes(torch.tensor([[1, 2], [3, code]]), 7)
    counter = torch.zeros((), dtype=torch.int64)
    packed = pack_codes(torch.tensor([1, 129, -1]), 7, counter)
    assert counter == 2 and unpack_codes(packed, 7, 3).tolist() == [1, 1, 127]


def test_wrong_arguments_are_refused():
    for bits in (0, 33, -1):
        with pytest.raises(ValueError, match="1 to 32 bits"):
            pack_codes(torch.zeros(3, dtype=torch.int64), bits)
        with pytest.raises(ValueError, match="1 to 32 bits"):
            unpack_codes(torch.zeros(3, dtype=torch.uint8), bits, 3)
    with pytest.raises(ValueError, match="are needed, not"):
        pack_codes(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="are needed, not"):
        pack_codes(torch.tensor(3), 4)
    for packed, length in [
        (torch.zeros(2, dtype=torch.uint8), 4),
        (torch.zeros(3, dtype=torch.int64), 4),
        (torch.zeros(0, dtype=torch.uint8), -1),
    ]:
        with pytest.raises(ValueError, match=r"are uint8 \[\.\.\., "):
            unpack_codes(packed, 5, length)


def test_operator_contract():
    codes = draw((2, 20), 14)
    counter = torch.zeros((), dtype=torch.int64)
    torch.library.opcheck(torch.ops.dad_fast.pack_codes.default, (codes, 14, None))
    torch.library.opcheck(torch.ops.dad_fast.pack_codes.default, (codes, 14, counter))
    torch.library.opcheck(torch.ops.dad_fast.unpack_codes.default, (pack_codes(codes, 14), 14, 20))


def test_compiles_as_one_graph():
    codes = draw((2, 24), 11)
    compiled = torch.compile(
        lambda c: unpack_codes(pack_codes(c, 11), 11, 24) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(codes), codes + 1)
