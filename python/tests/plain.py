"""PartialFC in plain PyTorch: logits in float64, rows of the class centers as autograd and torch's optimizers have them."""

import torch


def with_margin(cosines, m2, m3):
    return (cosines.clamp(-1, 1).arccos() + m2).clamp(min=0).cos() - m3


class StraightThrough(torch.autograd.Function):
    """The margin forward, and no margin backward, as insightface has it."""

    @staticmethod
    def forward(ctx, cosines, m2, m3):
        return with_margin(cosines, m2, m3)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


class PlainHead(torch.nn.Module):
    """The loss over a given sample of the classes, with ArcFace's or CosFace's margin."""

    def __init__(self, weight: torch.Tensor, scale=64.0, m2=0.5, m3=0.0, straight_through=False):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone().double())
        self.scale, self.m2, self.m3, self.straight_through = scale, m2, m3, straight_through

    def forward(self, embeddings, labels, sample, m2=None, m3=None):
        """The rows' own m2 and m3 take the place of the head's."""
        rows = torch.nn.functional.normalize(self.weight[sample])
        cosines = torch.nn.functional.normalize(embeddings.double()) @ rows.T
        columns = torch.searchsorted(sample, labels)
        index = torch.arange(len(labels))
        target = cosines[index, columns]
        margins = self.m2 if m2 is None else m2.double(), self.m3 if m3 is None else m3.double()
        margin = (StraightThrough.apply if self.straight_through else with_margin)(target, *margins)
        logits = cosines.index_put((index, columns), margin) * self.scale
        return torch.nn.functional.cross_entropy(logits, columns)


class LazyRows:
    """An optimizer of the library's lazy rows: torch's own, on a copy of the sampled rows and of their state."""

    def __init__(self, parameter, kind, **options):
        self.parameter, self.kind, self.options = parameter, kind, options
        self.state: dict = {}
        self.step_count = 0

    def step(self, sample, lr):
        rows = torch.nn.Parameter(self.parameter.detach()[sample].clone())
        rows.grad = self.parameter.grad[sample].clone()
        optimizer = self.kind([rows], lr=lr, **self.options)
        names = ("exp_avg", "exp_avg_sq") if self.kind is torch.optim.AdamW else ("momentum_buffer",)
        for name in names:
            whole = self.state.setdefault(name, torch.zeros_like(self.parameter))
            optimizer.state[rows][name] = whole[sample].clone()
        if self.kind is torch.optim.AdamW:
            optimizer.state[rows]["step"] = torch.tensor(float(self.step_count))
        optimizer.step()
        self.step_count += 1
        with torch.no_grad():
            self.parameter[sample] = rows
            for name in names:
                self.state[name][sample] = optimizer.state[rows][name]
        self.parameter.grad = None


def data(steps, batch, features, classes, seed=0):
    """Batches of noisy copies of one vector for each class."""
    numbers = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(classes, features, generator=numbers)
    for _ in range(steps):
        labels = torch.randint(0, classes, (batch,), generator=numbers)
        yield prototypes[labels] + 0.3 * torch.randn(batch, features, generator=numbers), labels


def backbone(features, dim, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(features, dim), torch.nn.Tanh(), torch.nn.Linear(dim, dim))
