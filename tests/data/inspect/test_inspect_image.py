import torch

from localagg.data.inspect.inspect_image import is_nearly_empty


def test_nearly_empty_is_99_percent_within_8_levels():
    blank = torch.full((3, 100, 100), 120, dtype=torch.uint8)
    blank += torch.arange(-7, 8).repeat(2000)[: blank.numel()].view_as(blank).to(torch.uint8)
    assert is_nearly_empty(blank)
    dotted = blank.clone()
    dotted[:, :9, :10] = 255
    assert is_nearly_empty(dotted)  # 0.9 %
    dotted[:, :11, :10] = 255
    assert not is_nearly_empty(dotted)  # 1.1 %
    tinted = blank.clone()
    tinted[2, :, :50] = 0  # equal in two channels of three
    assert not is_nearly_empty(tinted)
    assert not is_nearly_empty(torch.arange(256, dtype=torch.uint8).expand(3, 64, 256))
    assert is_nearly_empty(torch.zeros(3, 1, 1, dtype=torch.uint8))
