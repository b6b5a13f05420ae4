"""Network and criterion of the recipes as one graph: no break, and after the first three canvases nothing is traced
anew. What a compiler makes of the graph is not looked at here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retina.cli.build import build
from retina.cli.compose import compose
from retina.model.retinanet import retinanet
from retina.types import Losses, Targets

RECIPES = {
    "default": [],
    "paper": ["experiment=paper"],
    "ATSS": ["loss=atss", "model.head_quality=true", "model.box_bins=null"],
    "TAL": ["loss=tal", "loss.distribution_weight=0.25"],
}
CANVASES = [(64, 64), (64, 96), (96, 64)]
SMALL = {"backbone": "resnet18_half", "fpn_channels": 16, "head_convs": 1, "levels": [3, 4, 5], "norm": "frozen"}


def some_targets(height: int, width: int) -> Targets:
    boxes = torch.tensor([[[4.0, 6, 0.6 * width, 0.7 * height], [8, 8, 40, 30]]]).expand(2, -1, -1)
    yes = torch.ones(2, 2, dtype=torch.bool)
    return Targets(boxes, torch.tensor([[0, 1], [2, 0]]), yes, ~yes)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_graph(name: str) -> None:
    """In a process of its own, without the type checks of tests, which no graph can hold."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command, cwd = [sys.executable, __file__, name], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]


def check(name: str) -> None:
    settings = compose("train", ["data=coco", *RECIPES[name]])
    torch.manual_seed(0)
    model = retinanet(**(settings["model"] | SMALL), num_classes=3).train()
    criterion = build(settings["loss"], "loss")
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    def step(images: torch.Tensor, sizes: torch.Tensor, targets: Targets) -> Losses:
        return criterion(model(images, sizes), targets)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    for seen in (False, True):
        for height, width in CANVASES:
            images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
            batch = images, torch.tensor([[height, width], [height - 20, width - 9]]), some_targets(height, width)
            with torch.compiler.set_stance("fail_on_recompile") if seen else torch.compiler.set_stance("default"):
                losses = compiled(*batch)
            expected = step(*batch)
            for one, other in zip(losses, expected, strict=True):
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(graphs) == len(CANVASES)
    losses.total().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


if __name__ == "__main__":
    check(sys.argv[1])
