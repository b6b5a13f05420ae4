"""A whole training loop of your own: data, model, loss and scores of `retina` in plain PyTorch.

python examples/train_custom.py draws a data set of shapes and trains on it. For your own data, give `main` its folder
in COCO's layout: annotations/instances_train.json, train/, annotations/instances_val.json and val/.
"""

import torch

import retina


def main(
    root: str = "data/shapes", *, epochs: int = 10, batch_size: int = 8, short_side: int = 128
) -> dict[str, float]:
    train, val = (retina.read_coco(f"{root}/annotations/instances_{s}.json", f"{root}/{s}") for s in ("train", "val"))
    batches = retina.train_loader(train, retina.default_pipeline(short_side, None), batch_size=batch_size)
    val_batches = retina.eval_loader(val, retina.eval_pipeline(short_side, None), batch_size=batch_size)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = retina.retinanet(num_classes=len(train.classes), backbone="resnet18", levels=[3, 4, 5]).to(device)
    criterion = retina.DetectionLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)

    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            batch = retina.to_device(batch, device)
            losses = criterion(model(batch.images, batch.sizes), batch.targets)
            loss = losses.total()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        metrics = retina.evaluate(model, val_batches, val).metrics
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}")
    return metrics["AP"]


if __name__ == "__main__":
    retina.write_shapes("data/shapes")
    main()
