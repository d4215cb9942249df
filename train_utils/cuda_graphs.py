"""The kernels of a training step, recorded once as a CUDA graph and launched together from then on.

Otherwise the host launches some four hundred small kernels for a step of the U-Net, and the GPU waits for it.
Milliseconds on an NVIDIA H200 (16 host cores, PyTorch 2.11, CUDA 13.0), measured by hand around `train.main`: of an
epoch of the tutorial's settings (5 steps, 20 photographs to validate on) the training and the validation, medians of 12
to 30 epochs; of the other recipes a training step, over 250 and medians of 6 epochs of 50:

    |                               | tutorial | tutorial --amp | quick | best         |
    |-------------------------------|----------|----------------|-------|--------------|
    | one launch after the other    | 200 + 65 | 211 + 57       | 47    | not measured |
    | by graphs                     | 125 + 58 | 54 + 53        | 18    | 28           |
    | by graphs, channels last      | 76 + 59  | (it is)        |       | 21           |

From the second row on, Muon's filters are worked on together (`train_utils.muon`), and the files of short epochs are
written less often (`train_utils.saver`). Saving an epoch took another 10 to 14, of `best` 32.

The arithmetic of a step of the tutorial's settings alone, as a graph: 23.2 ms, channels last 13.0, without TF32 53 and
50; with --amp in float16 8.6 (20 if not channels last), in bfloat16 10.7. `torch.backends.cudnn.benchmark` changes none
of them (13.0, 8.6), takes 12 seconds before the first epoch and 15 GB of memory, and so stays off.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # calls as usual before the recording, in which the libraries set themselves up

# (image, target) -> loss. It leaves the loss's gradients in the parameters, in place of earlier ones.
LossAndGradients = Callable[[Tensor, Tensor], Tensor]


class RecordedSteps:
    """Calls a function that computes a loss and its gradients, by graphs: one for each shape of the batch.

    A graph keeps the memory of its step, its gradients, and all that the function refers to; so a `RecordedSteps` is
    for one run of one model. The function may not wait for the GPU.

    Args:
        parameters: whose gradients the function sets.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._calls: dict[torch.Size, int] = defaultdict(int)
        self._graphs: dict[torch.Size, _Graph] = {}
        self._stream = torch.cuda.Stream()

    def __call__(self, function: LossAndGradients, image: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch on the GPU; the gradients are in the parameters until the next call."""
        shape = image.shape
        self._calls[shape] += 1
        if self._calls[shape] <= WARM_UP:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loss = function(image, target)
            torch.cuda.current_stream().wait_stream(self._stream)
            return loss
        if shape not in self._graphs:
            self._graphs[shape] = _Graph(function, image, target, self._parameters, self._stream)
        return self._graphs[shape].replay(image, target)


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
        self.graph = torch.cuda.CUDAGraph()
        # Another thread (of pinned memory) may use the GPU meanwhile.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.loss = function(self.image, self.target)
        self.gradients = [parameter.grad for parameter in parameters]

    def replay(self, image: Tensor, target: Tensor) -> Tensor:
        self.image.copy_(image)
        self.target.copy_(target)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # another graph may have set its own
        return self.loss.clone()  # the next replay writes another
