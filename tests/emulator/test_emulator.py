import pytest
import torch

from tests.emulator.emulator import HERE, EmulatorError, Program, needs_compiler

pytestmark = needs_compiler
PLANTED = Program(HERE / "planted.cuh", "planted::reverse<true>", "planted::reverse<false>")


@pytest.mark.parametrize("detect", ["memory", "races"])
def test_reverse(detect):
    x, y = torch.randn(64), torch.zeros(64)
    PLANTED.run("planted::reverse<true>", 1, 64, x, y, detect=detect)
    assert torch.equal(y, x.flip(0))


def test_race():
    x, y = torch.randn(64), torch.zeros(64)
    with pytest.raises(EmulatorError) as error:
        PLANTED.run("planted::reverse<false>", 1, 64, x, y, detect="races")
    print(error.value)
    PLANTED.run("planted::reverse<false>", 1, 64, x, y)
    assert not torch.equal(y, x.flip(0))
