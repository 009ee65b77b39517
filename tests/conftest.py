"""What every test starts from."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """On tensors as small as the tests', threads only wait for each other: ten times as long on two busy cores."""
    torch.set_num_threads(1)
