"""Orders of pixels against other ways of writing them down."""

import pytest
import torch

from mambakit.datamodules.vision.pixels import as_sequence, as_tokens, pixel_order


@pytest.mark.parametrize("length", [1, 2, 5, 8, 64, 784, 1024])
@pytest.mark.parametrize("order", ["sequential", "bit_reversal", "random"])
def test_every_pixel_once(length, order):
    assert sorted(pixel_order(length, order).tolist()) == list(range(length))


def test_bit_reversal_reverses_bits():
    assert pixel_order(8, "bit_reversal").tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    bits = [int(f"{place:010b}"[::-1], 2) for place in range(1024)]
    assert pixel_order(1024, "bit_reversal").tolist() == bits
    assert pixel_order(784, "bit_reversal").tolist() == [place for place in bits if place < 784]


def test_bit_reversal_is_that_of_an_fft():
    """s4 folds a column in halves; the even-odd recursion of Cooley and Tukey gives the same order."""

    def folded(places: list[int]) -> list[int]:
        return places if len(places) == 1 else folded(places[::2]) + folded(places[1::2])

    assert pixel_order(64, "bit_reversal").tolist() == folded(list(range(64)))


FIRST = [319, 576, 323, 107, 355]


def test_the_random_order_never_changes():
    assert pixel_order(784, "random")[:5].tolist() == FIRST
    assert pixel_order(784, "random", 1)[:5].tolist() != FIRST


def test_an_unknown_order():
    with pytest.raises(ValueError, match="pixel_order: 'snake', expected sequential, bit_reversal or random"):
        pixel_order(4, "snake")


def test_sequences():
    images = torch.arange(2 * 3 * 2 * 4, dtype=torch.uint8).view(2, 3, 2, 4)
    order = torch.tensor([5, 0, 7, 1, 2, 3, 4, 6])
    sequence = as_sequence(images, order)
    assert sequence.shape == (2, 8, 3) and sequence.is_contiguous()
    assert torch.equal(sequence[1, 0], images[1, :, 1, 1]), "pixel 5 is row 1, column 1"
    tokens = as_tokens(images, order)
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 24)
    assert tokens[0, :6].tolist() == [5, 13, 21, 0, 8, 16], "red, green and blue of pixel 5, then of pixel 0"
