"""The ways a user of stock PyTorch could write a case: the contestants that ours is compared with."""

import torch

from benchmarks.contestant import FWD, Contestant


def channels_last(eager: Contestant) -> Contestant:
    """Input and weights in channels_last, the layout that oneDNN prefers for convolutions."""
    return eager.converted("channels_last", memory_format=torch.channels_last)


def compiled(contestant: Contestant, pass_: str) -> Contestant:
    """torch.compile in its default mode; for inference with the weights frozen into the graph.

    `fullgraph` turns a graph break into an error, so that no figure of eager code is shown as one of compiled code.
    Dynamo leaves nn.LSTM out of its graphs unless told otherwise, so it is told.
    """
    name = "compile" if contestant.name == "eager" else f"{contestant.name}+compile"
    twin = contestant.converted(name)
    options = {"freezing": True} if pass_ == FWD else None
    twin.compiled = torch.compile(twin.forward, fullgraph=True, options=options)
    with torch._dynamo.config.patch(allow_rnn=True):
        if pass_ == FWD:
            twin.infer()
        else:
            twin.prepare_training()
            twin.train()
    return twin
