import torch

from hello_papers.analysis.mean_of_noise import Mean
from saigen.example import Example


def examples():
    yield Example(
        name="mean",
        kind="module",
        make=Mean,
        inputs=lambda generator: (torch.rand(4, 8, generator=generator),),
        code="from hello_papers.analysis.mean_of_noise import Mean\nprint(Mean())",
        wrong=((lambda: Mean(features=0), "features"),),
    )
