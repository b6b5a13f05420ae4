"""What a program does not use, it does not import: starts stay quick, and a broken package stops only who needs it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_programs_import_only_what_they_use(
    start: Callable[..., subprocess.Popen[str]], tiny_data: Path, trained_run: Path, tmp_path: Path
) -> None:
    """infer, eval and training with our own augmentation and without trackers, one behind the other in one process."""
    model = (
        "model.backbone=resnet18 model.levels=[3,4,5] model.fpn_channels=16 model.head_convs=1 model.anchor_sizes=null"
    )
    lengths = "train.length=1 train.eval_every=null train.save_every=1 train.batch_size=2 train.device=cpu"
    commands = [
        ["infer", f"checkpoint={trained_run}", f"source={tiny_data / 'val'}", "output=infer", "device=cpu"],
        ["eval", f"checkpoint={trained_run}", "output=eval", "device=cpu"],
        ["train", f"data.root={tiny_data}", "data.prepare=null", "trackers=[]", *model.split(), *lengths.split()],
    ]
    script = f"""
import json, runpy, sys
heavy = ["albumentations", "tensorboard", "matplotlib.figure", "matplotlib.pyplot", "pycocotools", "timm", "wandb"]
for command in {commands!r}:
    sys.argv = command
    try:
        runpy.run_path(f"{ROOT}/tools/{{command[0]}}.py", run_name="__main__")
    except SystemExit as ended:
        print(json.dumps([command[0], ended.code, [name for name in heavy if name in sys.modules]]), file=sys.stderr)
"""
    process = start("-c", script, cwd=tmp_path)
    out, err = process.communicate(timeout=1000)
    outcomes = [json.loads(line) for line in err.splitlines() if line.startswith("[")]
    curves = ["matplotlib.figure"]  # draws curves.png when it ends
    assert outcomes == [["infer", 0, []], ["eval", 0, []], ["train", 0, curves]], out + err
