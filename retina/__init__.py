"""RetinaNet-style detectors: train, evaluate, infer. The names below are the public face; each is imported when it is
first used, so that `import retina` takes no torch."""

from typing import TYPE_CHECKING

from retina._lazy import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:
    from retina.data.coco import read_coco as read_coco
    from retina.data.dataset import CocoDetection as CocoDetection
    from retina.data.loader import eval_loader as eval_loader
    from retina.data.loader import train_loader as train_loader
    from retina.data.shapes import write_shapes as write_shapes
    from retina.data.transforms import default_pipeline as default_pipeline
    from retina.data.transforms import eval_pipeline as eval_pipeline
    from retina.detections import postprocess as postprocess
    from retina.engine.config import TrainConfig as TrainConfig
    from retina.engine.loop import fit as fit
    from retina.errors import RetinaError as RetinaError
    from retina.evaluation.evaluate import evaluate as evaluate
    from retina.evaluation.metrics import coco_metrics as coco_metrics
    from retina.hub import load as load
    from retina.inference import Detector as Detector
    from retina.losses.detection import DetectionLoss as DetectionLoss
    from retina.losses.dice import SigmoidDiceLoss as SigmoidDiceLoss
    from retina.losses.dice import SoftmaxDiceLoss as SoftmaxDiceLoss
    from retina.losses.dice import sigmoid_dice_loss as sigmoid_dice_loss
    from retina.losses.dice import softmax_dice_loss as softmax_dice_loss
    from retina.losses.focal import SigmoidFocalLoss as SigmoidFocalLoss
    from retina.losses.focal import SoftmaxFocalLoss as SoftmaxFocalLoss
    from retina.losses.focal import sigmoid_focal_loss as sigmoid_focal_loss
    from retina.losses.focal import softmax_focal_loss as softmax_focal_loss
    from retina.losses.soft_targets import DistributionFocalLoss as DistributionFocalLoss
    from retina.losses.soft_targets import GHMLoss as GHMLoss
    from retina.losses.soft_targets import QualityFocalLoss as QualityFocalLoss
    from retina.losses.soft_targets import VarifocalLoss as VarifocalLoss
    from retina.losses.soft_targets import distribution_focal_loss as distribution_focal_loss
    from retina.losses.soft_targets import ghm_loss as ghm_loss
    from retina.losses.soft_targets import quality_focal_loss as quality_focal_loss
    from retina.losses.soft_targets import varifocal_loss as varifocal_loss
    from retina.model.retinanet import RetinaNet as RetinaNet
    from retina.model.retinanet import retinanet as retinanet
    from retina.ops.assigners import ATSS as ATSS
    from retina.ops.assigners import MaxIoU as MaxIoU
    from retina.ops.assigners import TaskAligned as TaskAligned
    from retina.types import Batch as Batch
    from retina.types import Detections as Detections
    from retina.types import Losses as Losses
    from retina.types import Predictions as Predictions
    from retina.types import Targets as Targets
    from retina.types import to_device as to_device
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
