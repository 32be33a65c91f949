import torch

from hf_ntp.functional import adam_step_


def test_steps_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
    theirs = [tensor.clone().requires_grad_() for tensor in ours]
    optimizer = torch.optim.Adam(theirs, lr=1e-2, betas=(0.8, 0.95))
    first, second = ([torch.zeros_like(tensor) for tensor in ours] for _ in range(2))
    for step in range(1, 6):
        # One transposed, as the gradient of a matrix product often is.
        gradients = [torch.randn(4, 3, generator=generator).T, torch.randn(5, generator=generator)]
        adam_step_(ours, gradients, first, second, step, 1e-2, (0.8, 0.95))
        for tensor, gradient in zip(theirs, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference.detach(), rtol=1e-5, atol=1e-6)


def test_the_first_step_has_the_length_of_the_rate():
    """Worked out by hand: both running means are corrected to the gradient and its square."""
    weight = [torch.tensor([1.0, 1.0, 1.0])]
    moments = [torch.zeros(3)], [torch.zeros(3)]
    adam_step_(weight, [torch.tensor([2.0, -0.5, 0.0])], *moments, step=1, rate=0.1)
    torch.testing.assert_close(weight[0], torch.tensor([0.9, 1.1, 1.0]))
