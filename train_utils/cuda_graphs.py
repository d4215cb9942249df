"""The kernels of a training step, recorded once as a CUDA graph and launched together from then on.

Without it a GPU waits for the host, which launches some four hundred small kernels for each step of the U-Net.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # calls as usual before the recording, in which the libraries set themselves up

# (image, target) -> loss, whose gradients it leaves in the parameters
LossAndGradients = Callable[[Tensor, Tensor], Tensor]


class RecordedSteps:
    """Calls a function that computes a loss and its gradients, by graphs: one for each shape of the batch.

    A graph keeps the memory of its step, its gradients, and all that the function refers to; so a `RecordedSteps` is
    for one run of one model. The function may not wait for the GPU.

    Args:
        parameters: whose gradients the function sets.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._calls: dict[torch.Size, int] = {}
        self._graphs: dict[torch.Size, _Graph] = {}
        self._stream = torch.cuda.Stream()

    def __call__(self, function: LossAndGradients, image: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch on the GPU or in pinned memory; the gradients are in the parameters until the next."""
        shape = image.shape
        if shape not in self._graphs:
            calls = self._calls[shape] = self._calls.get(shape, 0) + 1
            if calls <= WARM_UP:
                return self._on_stream(function, image, target)
            self._graphs[shape] = _Graph(function, image, target, self._parameters, self._stream)
        return self._graphs[shape].replay(image, target)

    def _on_stream(self, function: LossAndGradients, image: Tensor, target: Tensor) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = function(image, target)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss


class _Graph:
    def __init__(
        self,
        function: LossAndGradients,
        image: Tensor,
        target: Tensor,
        parameters: Sequence[Tensor],
        stream: torch.cuda.Stream,
    ) -> None:
        self.function = function  # what it refers to must live as long as the graph
        self.parameters = parameters
        self.image, self.target = image.clone(), target.clone()
        for parameter in parameters:
            parameter.grad = None  # the recording allocates them in the memory of the graph
        self.graph = torch.cuda.CUDAGraph()
        # Other threads (pinned memory, a file being saved) may use the GPU meanwhile.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.loss = function(self.image, self.target)
        self.gradients = [parameter.grad for parameter in parameters]

    def replay(self, image: Tensor, target: Tensor) -> Tensor:
        self.image.copy_(image, non_blocking=True)
        self.target.copy_(target, non_blocking=True)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone()  # the next replay writes another
